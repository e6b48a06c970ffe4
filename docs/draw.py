"""Draws docs/partition.svg from a small label map, by way of `hpcloss.plan.partition`: python docs/draw.py"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from hpcloss.plan.partition import Pairs, partition
from hpcloss.plan.regions import Grid

IGNORED = 255
LABELS = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 2, 2, 1, 1, 0],
        [0, 1, 2, 2, 2, 2, 1, 255],
        [0, 0, 2, 2, 2, 0, 255, 255],
    ]
)
REGION_SIZE = 4  # two regions side by side
ROW = 11  # the anchor whose positives are shown
TILE = 4
NOTHING, SELF, POSITIVE, NEGATIVE = range(4)

OF_LABEL = {0: "#d0d0d0", 1: "#7fb2e5", 2: "#f3b06b", IGNORED: "#ffffff"}
OF_RELATION = {NOTHING: "#ffffff", SELF: "#333333", POSITIVE: "#4fae6a", NEGATIVE: "#e9a3a0"}
SKIPPED = "#f1f1f1"


def plan() -> Pairs:
    grid = Grid(1, tuple(LABELS.shape), (REGION_SIZE, REGION_SIZE))
    return partition(LABELS, grid, background=0, ignore_index=(IGNORED,))


def relations(pairs: Pairs) -> Tensor:
    """What key row j is to anchor row i, from the intervals alone [N, N]."""
    rows, at = pairs.order.numel(), pairs.intervals
    found = torch.full((rows, rows), NOTHING)
    for anchors_from, anchors_to, keys_from, keys_to in zip(*[bound.tolist() for bound in at[3:]]):
        for row in range(anchors_from, anchors_to):
            found[row, keys_from:keys_to] = NEGATIVE
            found[row, at.pos_start[row] : at.pos_end[row]] = POSITIVE
            found[row, at.self_pos[row]] = SELF
    return found


def tiles_with_pairs(found: Tensor) -> Tensor:
    """Whether each tile holds a pair [N / TILE, N / TILE]."""
    return found.ge(POSITIVE).unfold(0, TILE, TILE).unfold(1, TILE, TILE).any(3).any(2)


# ------------------------------------------------------------------------------------------------------- drawing


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", thick: float = 1) -> str:
    line = f' stroke="{stroke}" stroke-width="{thick:g}"' if stroke != "none" else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{line}/>'


def write(x: float, y: float, words: str, size: int = 13, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def pixels(x: float, y: float, side: float) -> Iterator[str]:
    """The label map; numbers are flat pixel indices."""
    height, width = LABELS.shape
    for row, column in product(range(height), range(width)):
        at_x, at_y, number = x + column * side, y + row * side, row * width + column
        yield box(at_x, at_y, side, side, OF_LABEL[int(LABELS[row, column])], "#888888", 0.5)
        yield write(at_x + side / 2, at_y + side / 2 + 4, str(number), 10, "middle")
    for column in range(0, width, REGION_SIZE):
        yield box(x + column * side, y, REGION_SIZE * side, height * side, "none", "#222222", 2)


def strip(pairs: Pairs, x: float, y: float, side: float) -> Iterator[str]:
    """The sorted rows, and below them the intervals that the partition holds."""
    labels = LABELS.reshape(-1)[pairs.order].tolist()
    for row, (pixel, label) in enumerate(zip(pairs.order.tolist(), labels)):
        yield box(x + row * side, y, side, side, OF_LABEL[label], "#888888", 0.5)
        yield write(x + (row + 0.5) * side, y + side / 2 + 4, str(pixel), 10, "middle")
        if row % TILE == 0:
            yield write(x + (row + 0.5) * side, y - 5, str(row), 9, "middle")

    def interval(start: int, end: int, line: int, words: str) -> Iterator[str]:
        below = y + side + 10 + 20 * line
        yield box(x + start * side + 1, below, (end - start) * side - 2, 3, "#222222")
        yield write(x + start * side + 1, below + 14, words, 11)

    for region in range(pairs.intervals.key_end.numel()):
        keys = int(pairs.intervals.key_start[region]), int(pairs.intervals.key_end[region])
        anchors = int(pairs.intervals.anchor_start[region]), int(pairs.intervals.anchor_end[region])
        yield from interval(*keys, 0, f"keys of region {region}: rows {keys[0]} to {keys[1] - 1}")
        yield from interval(*anchors, 1, f"its anchors: {anchors[0]} to {anchors[1] - 1}")
    yield from interval(int(pairs.live()), len(labels), 0, "dead")
    yield from interval(
        int(pairs.intervals.pos_start[ROW]),
        int(pairs.intervals.pos_end[ROW]),
        2,
        f"positives of row {ROW}, itself excepted",
    )


def matrix(found: Tensor, x: float, y: float, side: float) -> Iterator[str]:
    """Every pair; tiles without one are grey."""
    for i, j in (~tiles_with_pairs(found)).nonzero().tolist():
        yield box(x + j * TILE * side, y + i * TILE * side, TILE * side, TILE * side, SKIPPED)
    for i, j in found.nonzero().tolist():
        yield box(x + j * side, y + i * side, side, side, OF_RELATION[int(found[i, j])])
    for line in range(0, len(found) + 1, TILE):
        yield box(x + line * side - 0.5, y, 1, len(found) * side, "#888888")
        yield box(x, y + line * side - 0.5, len(found) * side, 1, "#888888")
        if line < len(found):
            yield write(x - 5, y + (line + 0.8) * side, str(line), 9, "end")
            yield write(x + (line + 0.5) * side, y - 5, str(line), 9, "middle")


def legend(found: Tensor, x: float, y: float) -> Iterator[str]:
    visited = tiles_with_pairs(found)
    lines = [
        (OF_RELATION[POSITIVE], f"positive of the row: {int((found == POSITIVE).sum())} pairs"),
        (OF_RELATION[NEGATIVE], f"negative: {int((found == NEGATIVE).sum())} pairs"),
        (OF_RELATION[SELF], "the anchor itself: neither"),
        (SKIPPED, f"tile without a pair: {int((~visited).sum())} of {visited.numel()}, left out"),
        (OF_LABEL[0], "class 0, the background: keys, no anchors"),
        (OF_LABEL[1], "class 1"),
        (OF_LABEL[2], "class 2"),
        (OF_LABEL[IGNORED], "ignored: sorted to the end"),
    ]
    for line, (fill, words) in enumerate(lines):
        yield box(x, y + 24 * line, 16, 16, fill, "#888888", 0.5)
        yield write(x + 24, y + 24 * line + 13, words)


def picture() -> str:
    """The file's text."""
    pairs = plan()
    found = relations(pairs)
    parts = [
        box(0, 0, 900, 760, "#ffffff"),
        write(20, 28, "1. The label map: two regions of 4 x 4 pixels"),
        *pixels(20, 40, 28),
        write(20, 188, f"2. Its pixels, sorted by (region, class): {len(found)} rows, and their intervals"),
        *strip(pairs, 20, 212, 26),
        write(20, 336, "3. The pairs that these intervals mean: anchors down, keys across"),
        *matrix(found, 40, 366, 12),
        *legend(found, 460, 420),
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 760" font-family="sans-serif" fill="#222222">'
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("partition.svg").write_text(picture(), encoding="utf-8")
