"""The primitives as PyTorch tiles: exact, O((N + M) D) memory, any device, float32 and float64.

A tile of similarities is one matrix product. It is reduced at once and then overwritten. In self-contrast S is
symmetric, so only tiles on and above the diagonal are computed, and each serves both its rows and its columns. On the
CPU the intervals are read on the host and become contiguous slices. Blocks of anchors hold one class if classes are
long, so most tiles need no mask. On other devices nothing is read on the host: a fixed schedule covers all pairs, and
masks come from the intervals.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.backends.bounds import is_safe
from hpcloss.plan.partition import Intervals

BLOCK = 512  # rows of a tile; a 512 x 512 fp32 tile is 1 MB and stays in a core's cache
LONG_RUN = 128  # from so many anchors of one class on, their own block is cheaper than a mask
STATIC_BLOCK = 1024  # rows of a tile on devices where intervals are not read


class Tile(NamedTuple):
    """Anchor rows i0:i1 against key rows j0:j1.

    mirrored: the columns are anchors too, and their pairs with the rows belong to this tile (self-contrast). diagonal:
    the columns are the rows (self-contrast), so both directions of a pair are inside. has_self: some anchors may meet
    themselves in the tile, and not on its diagonal. positives: "none", "some" or "all" of the tile's pairs are
    positives, apart from the anchor itself. "none" and "all"
        are known only if tiles are cut by class.
    mixed: the tile may hold pairs of no region.
    """

    i0: int
    i1: int
    j0: int
    j1: int
    mirrored: bool = False
    diagonal: bool = False
    has_self: bool = False
    positives: str = "some"
    mixed: bool = False


# ---------------------------------------------------------------------------------------------------- schedule


def _schedule(at: Intervals, num_keys: int, rule: str, symmetric: bool, by_class: bool) -> Iterator[list[Tile]]:
    """Tiles that hold all pairs of the rule, grouped by block of rows."""
    if at.pos_start.device.type == "cpu":
        return _sliced_schedule(at, rule, symmetric, by_class)
    return _static_schedule(at.pos_start.numel(), num_keys, symmetric)


def _static_schedule(num_rows: int, num_keys: int, symmetric: bool) -> Iterator[list[Tile]]:
    for i0 in range(0, num_rows, STATIC_BLOCK):
        i1 = min(i0 + STATIC_BLOCK, num_rows)
        if symmetric:
            tiles = [Tile(i0, i1, i0, i1, diagonal=True, mixed=True)]
            first = i1
        else:
            tiles, first = [], 0
        for j0 in range(first, num_keys, STATIC_BLOCK):
            tiles.append(Tile(i0, i1, j0, min(j0 + STATIC_BLOCK, num_keys), mirrored=symmetric, mixed=True))
        if tiles:
            yield tiles


def _sliced_schedule(at: Intervals, rule: str, symmetric: bool, by_class: bool) -> Iterator[list[Tile]]:
    by_class = by_class or rule in ("positives", "negatives")  # other rules do not need the positives
    has_self = rule != "every" and not symmetric and bool((at.self_pos >= 0).any())
    edges = run_edges(at) if by_class else []
    runs = zip([0, *edges], [*edges, at.pos_start.numel()])
    long_runs = [(first, last) for first, last in runs if last - first >= LONG_RUN]
    for a0, a1, k0, k1 in zip(
        *(bound.tolist() for bound in [at.anchor_start, at.anchor_end, at.key_start, at.key_end]), strict=True
    ):
        one_run = bisect_right(edges, a0) == bisect_left(edges, a1)
        for i0, i1, pure in _row_blocks(a0, a1, [(a0, a1)] if one_run else long_runs):
            starts, ends = at.pos_start[i0:i1], at.pos_end[i0:i1]
            p0, p1 = (int(starts[0]), int(ends[0])) if pure else (int(starts.min()), int(ends.max()))
            p0 = min(max(p0, k0), k1)  # an empty interval may lie anywhere
            p1 = min(max(p1, p0), k1)
            if symmetric and not pure and p0 < i1 and p1 > i0:
                p0, p1 = min(p0, i0), max(p1, i1)  # the block against itself is one tile
            near = (p0, p1, "all" if pure else "some")
            if rule == "positives":
                spans = [near]
            elif by_class:
                spans = [(k0, p0, "none"), near, (p1, k1, "none")]
            else:
                spans = [(k0, k1, "some")]
            if rule == "negatives" and pure:
                del spans[1]
            tiles = [
                tile._replace(positives=positives)
                for first, last, positives in spans
                for tile in _cut(i0, i1, a0, a1, first, last, symmetric)
            ]
            if has_self:
                first, last = int(at.self_pos[i0:i1].min()), int(at.self_pos[i0:i1].max())
                tiles = [tile._replace(has_self=tile.j0 <= last and tile.j1 > first) for tile in tiles]
            if tiles:
                yield tiles


def _has_one_positive(at: Intervals) -> bool:
    """Whether every interval of positives holds at most one key. Asked on the CPU only, where reading is free."""
    return at.pos_start.device.type == "cpu" and bool((at.pos_end - at.pos_start <= 1).all())


def run_edges(at: Intervals) -> list[int]:
    """Rows at which the positive interval changes."""
    changes = (at.pos_start[1:] != at.pos_start[:-1]) | (at.pos_end[1:] != at.pos_end[:-1])
    return (changes.nonzero().view(-1) + 1).tolist()


def _row_blocks(start: int, end: int, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Cut anchors start:end into blocks (i0, i1, pure). A pure block lies in one run of equal positives."""
    pieces: list[tuple[int, int, bool]] = []
    done = start
    for first, last in runs[bisect_right(runs, start, key=itemgetter(1)) :]:
        first, last = max(first, start), min(last, end)
        if first >= end:
            break
        pieces += (done, first, False), (first, last, True)
        done = last
    for first, last, pure in [*pieces, (done, end, False)]:
        for i0, i1 in _even(first, last, BLOCK):
            yield i0, i1, pure


def _even(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut start:end into as few and as equal pieces of at most `most` rows as possible."""
    pieces = -(-(end - start) // most)
    for piece in range(pieces):
        yield start + piece * (end - start) // pieces, start + (piece + 1) * (end - start) // pieces


def _cut(i0: int, i1: int, a0: int, a1: int, c0: int, c1: int, symmetric: bool) -> Iterator[Tile]:
    """Tiles of rows i0:i1 and columns c0:c1. In self-contrast, anchors left of the block have already met its rows."""
    parts = [(c0, c1, False)]
    if symmetric:
        if c0 < i1 and c1 > i0:
            yield Tile(i0, i1, i0, i1, diagonal=True)
        parts = [(c0, min(c1, a0), False), (max(c0, i1), min(c1, a1), True), (max(c0, a1), c1, False)]
    for first, last, mirrored in parts:
        for j0, j1 in _even(first, last, BLOCK * BLOCK // (i1 - i0)):
            yield Tile(i0, i1, j0, j1, mirrored=mirrored)


def _allowed(tile: Tile, at: Intervals, rule: str, symmetric: bool) -> Tensor:
    """Which pairs of a mixed tile the rule counts, [rows, columns]."""
    rows = slice(tile.i0, tile.i1)
    keys = torch.arange(tile.j0, tile.j1, device=at.pos_start.device)
    inside = _inside(tile, at)
    if rule == "positives":
        allowed = inside
    else:
        last_key = at.key_end if symmetric else at.anchor_end  # in self-contrast key rows belong to a region too
        row_numbers = torch.arange(tile.i0, tile.i1, device=keys.device, dtype=last_key.dtype)
        region = torch.searchsorted(last_key, row_numbers, right=True)
        dead = region == last_key.numel()
        region = torch.where(dead, 0, region)
        if not symmetric:
            dead |= row_numbers < at.anchor_start[region]
        allowed = (keys >= at.key_start[region, None]) & (keys < at.key_end[region, None]) & ~dead[:, None]
        if rule == "negatives":
            allowed &= ~inside
    if rule != "every":
        allowed &= keys != at.self_pos[rows, None]
    return allowed


def _inside(tile: Tile, at: Intervals) -> Tensor:
    """Which keys of the tile lie in the anchor's interval of positives, [rows, columns]."""
    rows = slice(tile.i0, tile.i1)
    keys = torch.arange(tile.j0, tile.j1, dtype=at.pos_start.dtype, device=at.pos_start.device)
    return (keys >= at.pos_start[rows, None]).logical_and_(keys < at.pos_end[rows, None])


# -------------------------------------------------------------------------------------------------------- tiles


class Tiles:
    """Similarity tiles of one call. Each is computed into the same buffer.

    by_class: cut the tiles where positives begin and end, so that few tiles mix positives and other pairs.
    """

    def __init__(
        self,
        anchors: Tensor,
        keys: Tensor | None,
        at: Intervals,
        rule: str,
        anchor_scale: Tensor | float = 1.0,
        by_class: bool = False,
    ):
        self.symmetric = keys is None
        self.anchors = anchors
        self.keys = anchors if keys is None else keys
        self.at, self.rule, self.anchor_scale = at, rule, anchor_scale
        self.blocks = _schedule(at, self.keys.shape[0], rule, self.symmetric, by_class)
        self.buffers: dict[str, Tensor] = {}
        self.one_positive = rule == "negatives" and _has_one_positive(at)

    def __iter__(self) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile with its similarities times `anchor_scale`; the next tile overwrites them."""
        for block in self.blocks:
            rows = self.anchors[block[0].i0 : block[0].i1] * self.anchor_scale
            for tile in block:
                keys = self.keys[tile.j0 : tile.j1]
                yield tile, torch.mm(rows, keys.T, out=self.buffer("similarity", tile))

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """Memory of the tile's shape; the next tile that asks for the same name overwrites it."""
        shape = (tile.i1 - tile.i0, tile.j1 - tile.j0)
        held = self.buffers.get(name)
        if held is None or held.numel() < shape[0] * shape[1]:
            held = self.buffers[name] = self.anchors.new_empty(shape[0] * shape[1])
        return held[: shape[0] * shape[1]].view(shape)

    def exclude(self, tile: Tile, values: Tensor, fill: float, rule: str | None = None) -> Tensor:
        """Overwrite the pairs of the tile that the rule, by default that of all tiles, does not count."""
        rule = rule or self.rule
        if tile.mixed:
            return values.masked_fill_(~_allowed(tile, self.at, rule, self.symmetric), fill)
        if rule == "positives" and tile.positives != "all":
            values.masked_fill_(~_inside(tile, self.at), fill)
        elif rule == "negatives" and tile.positives == "some":
            if self.one_positive:
                self._overwrite(tile, values, self.at.pos_start, self.at.pos_end > self.at.pos_start, fill)
            else:
                values.masked_fill_(_inside(tile, self.at), fill)
        if rule != "every" and tile.diagonal:
            values.fill_diagonal_(fill)
        elif rule != "every" and tile.has_self:
            self._overwrite(tile, values, self.at.self_pos, self.at.self_pos >= 0, fill)
        return values

    def _overwrite(self, tile: Tile, values: Tensor, key: Tensor, there: Tensor, fill: float) -> None:
        """Overwrite one pair of each anchor, the pair with key row `key` [N], if `there` [N] is true."""
        rows = slice(tile.i0, tile.i1)
        column = key[rows] - tile.j0
        row = (there[rows] & (column >= 0) & (column < values.shape[1])).nonzero().view(-1)
        values[row, column[row].long()] = fill

    def scatter(self, tile: Tile, slope: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None) -> None:
        """Add slope @ keys to the rows and slope.T @ anchors to the columns (a diagonal tile's rows have both)."""
        if d_anchors is not None:
            d_anchors[tile.i0 : tile.i1].addmm_(slope, self.keys[tile.j0 : tile.j1])
        if d_keys is not None and not tile.diagonal:
            d_keys[tile.j0 : tile.j1].addmm_(slope.T, self.anchors[tile.i0 : tile.i1])


class Side(NamedTuple):
    """One direction of a tile: statistics of the anchors `own` lie along its rows (dim 1 summed) or columns (dim 0)."""

    own: slice
    other: slice
    dim: int

    def along(self, values: Tensor) -> Tensor:
        return self.lay(values[self.own])

    def across(self, values: Tensor) -> Tensor:
        return values[self.other] if self.dim == 1 else values[self.other, None]

    def lay(self, values: Tensor) -> Tensor:
        """Values of the own anchors alone, as they lie along the tile."""
        return values[:, None] if self.dim == 1 else values


def sides(tile: Tile, both: bool) -> list[Side]:
    """The direction in which the rows are anchors, and with `both` the one in which the columns are."""
    rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    return [Side(rows, columns, 1), Side(columns, rows, 0)][: 2 if both else 1]


def is_safe_for(
    anchors: Tensor, keys: Tensor | None, scale_bound: float | None, *, twice: bool = False, margin: float = 0.0
) -> bool:
    """`is_safe` for sums over these keys."""
    count = (anchors if keys is None else keys).shape[0]
    return is_safe(count, scale_bound, anchors.dtype, twice=twice, margin=margin)
