"""Which pairs count: pixels sorted by (region, class), and the intervals that the sort leaves behind.

After a stable sort by (region, label), background first in its region and ignored pixels last, the keys an anchor may
meet are one interval (its region), its positives are one sub-interval (its class), and the anchors of a region are one
interval too. "Which pairs count" is then arithmetic on row numbers; no label matrix exists anywhere.

Nothing here reads device data on the host and every shape is static, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
LOWEST = torch.iinfo(torch.int64).min


class Pairs(NamedTuple):
    """The pairs of N anchor rows with M key rows (M = N in self-contrast), as intervals of key rows.

    order [N]                   flat pixel index of each anchor row.
    pos_start, pos_end [N]      the keys of the row's own class: its positives, itself included where it is a key.
    self_pos [N]                the key row that is this anchor, -1 for none. A row never meets itself.
    anchor_start, anchor_end [R]  the rows of each region that are anchors, in ascending order of regions.
    key_start, key_end [R]      the keys that the anchors of the region may meet.

    All int32 (int64 beyond 2^31 rows). Rows in no anchor interval are keys only, or dead.
    """

    order: Tensor
    pos_start: Tensor
    pos_end: Tensor
    self_pos: Tensor
    anchor_start: Tensor
    anchor_end: Tensor
    key_start: Tensor
    key_end: Tensor

    @staticmethod
    def from_intervals(intervals: Sequence[Tensor]) -> Pairs:
        """The pairs an operator was given; it has no use for the order."""
        return Pairs(intervals[0], *intervals)

    def replace(self, **changes: Tensor) -> Pairs:
        """As `_replace`, which breaks graphs on older torch."""
        return Pairs(*[changes[name] if name in changes else getattr(self, name) for name in FIELDS])

    def intervals(self) -> tuple[Tensor, ...]:
        """What the primitives need: everything but the order."""
        # One by one: slicing a named tuple breaks graphs on older torch.
        rows = (self.pos_start, self.pos_end, self.self_pos)
        return (*rows, self.anchor_start, self.anchor_end, self.key_start, self.key_end)

    def live(self) -> Tensor:
        """Number of leading rows that are anchors or keys, [1]; the rest of the order is dead."""
        return self.anchor_end[-1:]

    def head(self, count: int) -> Pairs:
        """The first rows alone, where it is known that the rest is dead."""
        return self.replace(
            order=self.order[:count],
            pos_start=self.pos_start[:count],
            pos_end=self.pos_end[:count],
            self_pos=self.self_pos[:count],
        )

    def region(self) -> Tensor:
        """Region of each row [N]; rows that are no anchors get some region, and `is_anchor` is False for them."""
        rows = torch.arange(self.pos_start.numel(), dtype=self.anchor_end.dtype, device=self.pos_start.device)
        return torch.searchsorted(self.anchor_end, rows, right=True).clamp_(max=self.anchor_end.numel() - 1)

    def is_anchor(self) -> Tensor:
        """Whether each row is an anchor [N]."""
        region = self.region()
        rows = torch.arange(self.pos_start.numel(), device=self.pos_start.device)
        return (rows >= self.anchor_start[region]) & (rows < self.anchor_end[region])

    def self_is_positive(self) -> Tensor:
        """Whether the row's own key lies in its positive interval [N]."""
        return (self.self_pos >= self.pos_start) & (self.self_pos < self.pos_end)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Number of positives and of negatives of each row [N]; zero for rows that are no anchors."""
        region, anchor = self.region(), self.is_anchor()
        key_start, key_end = self.key_start[region], self.key_end[region]
        own_class = self.pos_end - self.pos_start
        self_is_key = (self.self_pos >= key_start) & (self.self_pos < key_end)
        positives = own_class - self.self_is_positive().to(own_class.dtype)
        others = key_end - key_start - self_is_key.to(own_class.dtype)
        return positives * anchor, (others - positives) * anchor


FIELDS = Pairs._fields


def index_dtype(count: int) -> torch.dtype:
    """int32 while row numbers fit, int64 beyond."""
    return torch.int32 if count <= INT32_MAX else torch.int64


def is_ignored(labels: Tensor, ignore_index: tuple[int, ...], num_classes: int | None = None) -> Tensor:
    """Labels that remove their pixel: those of `ignore_index`, and those outside [0, num_classes) if it is given."""
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    for value in ignore_index:
        ignored = ignored | (labels == value)
    if num_classes is not None:
        ignored = ignored | (labels < 0) | (labels >= num_classes)
    return ignored


def partition(
    labels: Tensor,
    regions: Tensor | None = None,
    num_regions: int = 1,
    *,
    background: int | None = None,
    ignore_index: tuple[int, ...] = (),
    num_classes: int | None = None,
) -> Pairs:
    """Sort pixels by (region, label) and return the self-contrast `Pairs` of the sorted rows.

    labels [N]: any integers. regions [N]: region of each pixel; ids outside [0, num_regions) remove the pixel.
    Ignored and removed pixels are the dead tail of the order. `background` sorts first in its region and is no anchor.
    With `num_classes` labels outside [0, num_classes) are ignored too, and one sort of a combined key gives the same
    order as the two sorts without it.
    """
    labels = labels.reshape(-1).long()
    dead = is_ignored(labels, ignore_index, num_classes)
    region = torch.zeros_like(labels)
    if regions is not None:
        region = regions.reshape(-1).long()
        dead = dead | (region < 0) | (region >= num_regions)
    region = torch.where(dead, num_regions, region)

    if num_classes is not None:
        rank, background_ranked = _rank(labels, num_classes, background)
        key = torch.where(dead, num_regions * num_classes, region * num_classes + rank)
        key = key.to(index_dtype(num_regions * num_classes))
        key, order = torch.sort(key, stable=True)
        segments = torch.arange(num_regions * num_classes + 1, dtype=key.dtype, device=key.device)
        offsets = torch.searchsorted(key, segments)
        return from_offsets(order, offsets, num_classes, background_ranked)

    rank = labels if background is None else torch.where(labels == background, LOWEST, labels)
    by_label = torch.sort(rank, stable=True).indices
    order = by_label[torch.sort(region[by_label], stable=True).indices]
    region, rank = region[order], rank[order]
    rows = torch.arange(order.numel(), device=order.device)
    alive = region < num_regions
    pos_start, pos_end = segment_bounds(_changes(region) | _changes(rank))
    offsets = torch.searchsorted(region, torch.arange(num_regions + 1, device=region.device))
    anchor_start = offsets[:-1]
    if background is not None:
        seen = torch.nn.functional.pad(torch.cumsum((rank == LOWEST) & alive, 0), (1, 0))
        anchor_start = anchor_start + seen[offsets[1:]] - seen[offsets[:-1]]
    dtype = index_dtype(order.numel())
    intervals = (pos_start * alive, pos_end * alive, rows, anchor_start, offsets[1:], offsets[:-1], offsets[1:])
    return Pairs(order.to(dtype), *(bound.to(dtype) for bound in intervals))


def from_offsets(order: Tensor, offsets: Tensor, num_classes: int, background_ranked: bool) -> Pairs:
    """Self-contrast `Pairs` of rows already sorted by (region, class rank); segment r * num_classes + c is
    rows offsets[r * num_classes + c] to the next offset. `background_ranked`: rank 0 is the background."""
    dtype = index_dtype(order.numel())
    rows = torch.arange(order.numel(), device=order.device, dtype=offsets.dtype)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    alive = segment < offsets.numel() - 1
    segment = segment * alive
    anchor_start = offsets[1::num_classes] if background_ranked else offsets[:-1:num_classes]
    anchor_end, key_end = offsets[num_classes::num_classes], offsets[num_classes::num_classes]
    key_start = offsets[:-1:num_classes]
    bounds = (anchor_start, anchor_end, key_start, key_end)
    intervals = (offsets[segment] * alive, offsets[segment + 1] * alive, rows, *bounds)
    return Pairs(order.to(dtype), *(bound.to(dtype) for bound in intervals))


def class_offsets(pairs: Pairs, labels: Tensor, num_classes: int, background: int | None) -> tuple[Tensor, bool]:
    """Offsets [R * num_classes + 1] of the (region, class) segments of `pairs`, and whether rank 0 is background."""
    rank, background_ranked = _rank(labels.reshape(-1).long()[pairs.order], num_classes, background)
    rows = torch.arange(pairs.order.numel(), device=rank.device)
    num_regions = pairs.key_end.numel()
    region = torch.searchsorted(pairs.key_end, rows.to(pairs.key_end.dtype), right=True)
    key = torch.where(region < num_regions, region * num_classes + rank, num_regions * num_classes)
    segments = torch.arange(num_regions * num_classes + 1, device=key.device)
    return torch.searchsorted(key, segments), background_ranked


def _rank(labels: Tensor, num_classes: int, background: int | None) -> tuple[Tensor, bool]:
    """Position of each label among the classes of a region, background first; and whether there is a background."""
    if background is None or not 0 <= background < num_classes:
        return labels, False
    return torch.where(labels == background, 0, labels + (labels < background)), True


def _changes(values: Tensor) -> Tensor:
    """Rows whose value differs from the row before; the first row counts as a change."""
    changed = torch.ones_like(values, dtype=torch.bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def segment_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """First row and one past the last row of the segment of each row; `starts` marks the rows that begin a segment."""
    count = starts.numel()
    rows = torch.arange(count, device=starts.device)
    if count == 0:
        return rows, rows
    begin = torch.cummax(torch.where(starts, rows, 0), 0).values
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    end = torch.cummin(torch.where(ends, rows + 1, count).flip(0), 0).values.flip(0)
    return begin, end


def partition_against(
    labels: Tensor, key_labels: Tensor, *, ignore_index: tuple[int, ...] = ()
) -> tuple[Pairs, Tensor]:
    """Anchors with `labels` [N] against other keys with `key_labels` [M]; keys of one class become one interval.

    Returns the `Pairs` (rows in ascending order, ignored anchors meet no key) and the order [M] in which to pack the
    keys: sorted by label, ignored keys last. Anchors are in no way among the keys, so nothing is "self".
    """
    keys = partition(key_labels, ignore_index=ignore_index)
    anchors = partition(labels, ignore_index=ignore_index)
    live = keys.key_end[-1:]
    # A dead tail that compares greater than every label keeps the search inside the live keys.
    ranked_keys = key_labels.reshape(-1).long()[keys.order]
    alive = torch.arange(ranked_keys.numel(), device=live.device) < live
    ranked_keys = torch.where(alive, ranked_keys, torch.iinfo(torch.int64).max)
    ranked = labels.reshape(-1).long()[anchors.order]
    pos_start = torch.minimum(torch.searchsorted(ranked_keys, ranked), live).to(live.dtype)
    pos_end = torch.minimum(torch.searchsorted(ranked_keys, ranked, right=True), live).to(live.dtype)
    pairs = anchors.replace(
        pos_start=pos_start,
        pos_end=pos_end,
        self_pos=torch.full_like(pos_start, -1),
        key_start=torch.zeros_like(live),
        key_end=live,
    )
    return pairs, keys.order


def paired(pairs: Pairs, partner: Tensor) -> Pairs:
    """The same anchors and keys with one explicit positive each: `partner` [N] is its key row."""
    return pairs.replace(pos_start=partner.to(pairs.order.dtype), pos_end=(partner + 1).to(pairs.order.dtype))


def one_to_one(count: int, device: torch.device) -> Pairs:
    """Anchor i with key i as its positive and all other keys as negatives; anchors are not among the keys."""
    rows = torch.arange(count, dtype=index_dtype(count), device=device)
    starts, ends = rows.new_zeros(2, 1), rows.new_full((2, 1), count)
    # No tensor twice: an operator's inputs may not alias.
    return Pairs(rows, rows.clone(), rows + 1, torch.full_like(rows, -1), starts[0], ends[0], starts[1], ends[1])


def against_cells(pairs: Pairs, cells: Pairs, cell_of_region: Tensor, labels: Tensor, background: int | None) -> Pairs:
    """The anchors of `pairs` against one small cell of each region: keys in the order of `cells`.

    pairs, cells: partitions of the same pixels, by region and by small cell. cell_of_region [R]: the cell that the
    anchors of each region meet; the number of cells stands for "none". labels [pixels].
    """
    dtype, device = pairs.order.dtype, pairs.order.device
    labels = labels.reshape(-1).long()
    num_pixels, num_cells = labels.numel(), cells.key_end.numel()
    # Classes by dense rank, so that (cell, class) is one number in the order of the cells' rows.
    rank = labels if background is None else torch.where(labels == background, LOWEST, labels)
    ranked, by_label = torch.sort(rank, stable=True)
    dense = torch.empty_like(by_label).scatter_(0, by_label, torch.cumsum(_changes(ranked), 0))

    rows = torch.arange(cells.order.numel(), device=device)
    cell = torch.searchsorted(cells.key_end, rows.to(dtype), right=True)
    alive = cell < num_cells
    segment = torch.where(alive, cell * (num_pixels + 1) + dense[cells.order], torch.iinfo(torch.int64).max)
    target = cell_of_region[pairs.region()] * (num_pixels + 1) + dense[pairs.order]
    pos_start = torch.searchsorted(segment, target)
    pos_end = torch.searchsorted(segment, target, right=True)

    row_of_pixel = torch.full((num_pixels + 1,), -1, dtype=torch.int64, device=device)
    row_of_pixel = row_of_pixel.scatter_(0, torch.where(alive, cells.order.long(), num_pixels), rows)
    key_start = torch.nn.functional.pad(cells.key_start, (0, 1))[cell_of_region]
    key_end = torch.nn.functional.pad(cells.key_end, (0, 1))[cell_of_region]
    return pairs.replace(
        pos_start=pos_start.to(dtype),
        pos_end=pos_end.to(dtype),
        self_pos=row_of_pixel[pairs.order].to(dtype),
        key_start=key_start,
        key_end=key_end,
    )
