"""Which pairs count: pixels sorted by (region, class), and the intervals that the sort leaves behind.

After a stable sort by (region, label), background first in its region and ignored pixels last, the keys an anchor may
meet are one interval (its region), its positives are one sub-interval (its class), and the anchors of a region are one
interval too. "Which pairs count" is then arithmetic on row numbers; no label matrix exists anywhere.

Nothing here reads device data on the host and every shape is static, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.native import MAX_AXES
from hpcloss.regions import Grid
from hpcloss.sorting import changes, index_dtype, is_class


class Pairs(NamedTuple):
    """The pairs of N anchor rows with M key rows (M = N in self-contrast), as intervals of key rows.

    order [N]                   flat pixel index of each anchor row.
    pos_start, pos_end [N]      the keys of the row's own class: its positives, itself included where it is a key.
    self_pos [N]                the key row that is this anchor, -1 for none. A row never meets itself.
    anchor_start, anchor_end [R]  the rows of each region that are anchors, in ascending order of regions.
    key_start, key_end [R]      the keys that the anchors of the region may meet; these may come in any order.

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
        return torch.ops.hpcloss.pair_counts(*self.intervals())

    def counted(self, *, need_negatives: bool = False) -> Tensor:
        """Whether each row has a positive [N], and a negative if asked; False for rows that are no anchors."""
        return torch.ops.hpcloss.pair_counted(*self.intervals(), need_negatives)


FIELDS = Pairs._fields


def partition(
    labels: Tensor,
    regions: Tensor | Grid | None = None,
    num_regions: int = 1,
    *,
    background: int | None = None,
    ignore_index: tuple[int, ...] = (),
    num_classes: int | None = None,
) -> Pairs:
    """Sort pixels by (region, label) and return the self-contrast `Pairs` of the sorted rows.

    labels: any shape, any integers. regions: a grid, or the region of each pixel [N] and their number; ids outside
    [0, num_regions) remove the pixel. Ignored and removed pixels are the dead tail of the order. `background` sorts
    first in its region and is no anchor. With `num_classes` labels outside [0, num_classes) are ignored too, and a
    counting sort in the native library gives the same order as the sorts without it.
    """
    if num_classes is not None:
        rows = class_sort(
            labels, regions, num_regions, background=background, ignore_index=ignore_index, num_classes=num_classes
        )
        return from_offsets(rows.order, rows.offsets, num_classes, is_class(background, num_classes))
    ids, spatial, size, per_image, num_regions = _regions(labels, regions, num_regions)
    arguments = (labels, ids, spatial, size, per_image, num_regions, background, ignore_index)
    return Pairs(*torch.ops.hpcloss.label_sort(*arguments))


class ClassRows(NamedTuple):
    """Pixels sorted by (region, class); segment r * num_classes + c holds class number c of region r, background first.

    order [N]                          flat pixel index of each row; ignored pixels are the tail.
    offsets [R * num_classes + 1]      first row of each segment; the last is the number of rows that are not ignored.
    outside []                         number of pixels whose label is no class and not in `ignore_index`.
    """

    order: Tensor
    offsets: Tensor
    outside: Tensor


def class_sort(
    labels: Tensor,
    regions: Tensor | Grid | None = None,
    num_regions: int = 1,
    *,
    background: int | None = None,
    ignore_index: tuple[int, ...] = (),
    num_classes: int,
) -> ClassRows:
    """Stable counting sort of pixels by (region, class); arguments as for `partition`, order and offsets int32 (int64
    beyond 2^31 rows), outside int64."""
    ids, spatial, size, per_image, num_regions = _regions(labels, regions, num_regions)
    arguments = (labels, ids, spatial, size, per_image, num_regions, num_classes, background, ignore_index)
    return ClassRows(*torch.ops.hpcloss.class_sort(*arguments))


def from_offsets(order: Tensor, offsets: Tensor, num_classes: int, background_ranked: bool) -> Pairs:
    """Self-contrast `Pairs` of rows already sorted by (region, class rank); segment r * num_classes + c is
    rows offsets[r * num_classes + c] to the next offset. `background_ranked`: rank 0 is the background."""
    intervals = torch.ops.hpcloss.class_intervals(offsets, order.numel(), num_classes, background_ranked)
    return Pairs(order.to(index_dtype(order.numel())), *intervals)


def _regions(
    labels: Tensor, regions: Tensor | Grid | None, num_regions: int
) -> tuple[Tensor | None, list[int], list[int], bool, int]:
    """Regions as operators take them: ids, or the extents and cells of a grid; and their number."""
    if not isinstance(regions, Grid):
        if num_regions < 1:
            raise ValueError(f"num_regions must be at least 1, got {num_regions}")
        if regions is not None and regions.numel() != labels.numel():
            raise ValueError(f"regions must have one id for each of {labels.numel()} labels, got {regions.numel()}")
        return regions, [], [], False, num_regions
    if regions.batch * math.prod(regions.spatial) != labels.numel():
        raise ValueError(f"{regions} does not fit {labels.numel()} labels")
    if len(regions.size) != len(regions.spatial) or any([cell < 1 for cell in regions.size]):
        raise ValueError(f"{regions} must have a cell of at least 1 on every axis")
    if len(regions.spatial) > MAX_AXES:
        return regions.ids(labels.device), [], [], False, regions.num_regions()
    return None, list(regions.spatial), list(regions.size), regions.per_image, regions.num_regions()


# ---- partitions of other kinds


def partition_against(
    labels: Tensor, key_labels: Tensor, key_regions: Tensor | None = None, *, ignore_index: tuple[int, ...] = ()
) -> tuple[Pairs, Tensor]:
    """Anchors with `labels` [N] against other keys with `key_labels` [M]; keys of one class become one interval.

    key_regions [M]: keys outside region 0 are removed. Returns the `Pairs` (rows in ascending order, ignored anchors
    meet no key) and the order [M] in which to pack the keys: sorted by label, ignored keys last. Anchors are in no way
    among the keys, so nothing is "self".
    """
    keys = partition(key_labels, key_regions, ignore_index=ignore_index)
    anchors = partition(labels, ignore_index=ignore_index)
    live = keys.key_end[-1:]
    # A dead tail that compares greater than every label keeps the search inside the live keys.
    ranked_keys = key_labels.reshape(-1).long()[keys.order]
    alive = torch.arange(ranked_keys.numel(), device=live.device) < live
    ranked_keys = torch.where(alive, ranked_keys, torch.iinfo(torch.int64).max)
    ranked = labels.reshape(-1).long()[anchors.order]
    narrow = live.dtype == torch.int32
    pos_start, pos_end = (
        torch.minimum(torch.searchsorted(ranked_keys, ranked, right=right, out_int32=narrow), live)
        for right in (False, True)
    )
    pairs = anchors.replace(
        pos_start=pos_start,
        pos_end=pos_end,
        self_pos=torch.full_like(pos_start, -1),
        key_start=torch.zeros_like(live),
        key_end=live,
    )
    return pairs, keys.order


def from_offsets_against(
    order: Tensor, offsets: Tensor, key_offsets: Tensor, num_classes: int, background_ranked: bool = False
) -> Pairs:
    """`Pairs` of anchors and of other keys, both sorted by (region, class) as in `ClassRows`.

    order [N], offsets [R * num_classes + 1]: the anchors. key_offsets [R * num_classes + 1]: the keys' segments, of the
    same regions and classes; an anchor meets the keys of its region, and its positives are the keys of its class. No
    key is an anchor itself. `background_ranked`: class rank 0 is the background, a key and no anchor.
    """
    rows = torch.arange(order.numel(), dtype=offsets.dtype, device=order.device)
    segment = torch.searchsorted(offsets[1:], rows, right=True).clamp_(max=offsets.numel() - 2)
    dtype = index_dtype(max(order.numel(), 1))
    first = int(background_ranked)
    return Pairs(
        order.to(dtype),
        key_offsets[:-1][segment].to(dtype),
        key_offsets[1:][segment].to(dtype),
        torch.full_like(segment, -1, dtype=dtype),
        offsets[first:-1:num_classes].to(dtype, copy=True),
        offsets[num_classes::num_classes].to(dtype, copy=True),
        key_offsets[:-1:num_classes].to(dtype, copy=True),
        key_offsets[num_classes::num_classes].to(dtype, copy=True),
    )


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
    # Classes by dense rank, background first, so that (cell, class) is one number in the order of the cells' rows.
    by_label = torch.sort(labels, stable=True).indices
    if background is not None:
        by_label = by_label[torch.sort((labels != background)[by_label], stable=True).indices]
    dense = torch.empty_like(by_label).scatter_(0, by_label, torch.cumsum(changes(labels[by_label]), 0))

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
