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

from hpcloss import native
from hpcloss.ops import register
from hpcloss.regions import Grid

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
        return torch.ops.hpcloss.pair_counts(*self.intervals())


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


def is_class(label: int | None, num_classes: int) -> bool:
    """Whether there is such a label and it is one of the classes."""
    return label is not None and 0 <= label < num_classes


def from_offsets(order: Tensor, offsets: Tensor, num_classes: int, background_ranked: bool) -> Pairs:
    """Self-contrast `Pairs` of rows already sorted by (region, class rank); segment r * num_classes + c is
    rows offsets[r * num_classes + c] to the next offset. `background_ranked`: rank 0 is the background."""
    intervals = torch.ops.hpcloss.class_intervals(offsets, order.numel(), num_classes, background_ranked)
    return Pairs(order.to(index_dtype(order.numel())), *intervals)


# ---- operators: the native library's, or what follows here and says the same in PyTorch


def _regions(
    labels: Tensor, regions: Tensor | Grid | None, num_regions: int
) -> tuple[Tensor | None, list[int], list[int], bool, int]:
    """Regions as operators take them: ids, or the extents and cells of a grid; and their number."""
    if not isinstance(regions, Grid):
        return regions, [], [], False, num_regions
    if len(regions.spatial) > native.MAX_AXES:
        return regions.ids(labels.device), [], [], False, regions.num_regions()
    return None, list(regions.spatial), list(regions.size), regions.per_image, regions.num_regions()


def _region_of_pixel(
    labels: Tensor, ids: Tensor | None, spatial: list[int], size: list[int], per_image: bool
) -> Tensor:
    if ids is not None:
        return ids.reshape(-1).long().to(labels.device)
    pixels = math.prod(spatial)
    return Grid(labels.numel() // max(pixels, 1), tuple(spatial), tuple(size), per_image).ids(labels.device)


def _class_sort(
    labels: Tensor,
    ids: Tensor | None,
    spatial: list[int],
    size: list[int],
    per_image: bool,
    num_regions: int,
    num_classes: int,
    background: int | None,
    ignore_index: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    labels = labels.reshape(-1)
    if _is_countable(labels, num_regions * num_classes, ignore_index):
        return native.class_sort(
            _of_types(labels, torch.uint8), _ids_like(labels, ids), spatial, size,
            per_image, num_regions, range(num_classes), background, ignore_index, index_dtype(labels.numel()),
        )  # fmt: skip
    return _class_sort_in_torch(
        labels,
        _region_of_pixel(labels, ids, spatial, size, per_image),
        num_regions,
        num_classes,
        background,
        ignore_index,
    )


def _is_countable(labels: Tensor, num_segments: int, ignore_index: list[int]) -> bool:
    """Whether the native library can sort these labels."""
    small = num_segments <= native.MAX_SEGMENTS and len(ignore_index) <= native.MAX_IGNORED
    return small and labels.numel() > 0 and native.serves(labels)


def _class_sort_in_torch(
    labels: Tensor,
    region: Tensor,
    num_regions: int,
    num_classes: int,
    background: int | None,
    ignore_index: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    labels, dtype = labels.long(), index_dtype(labels.numel())
    ignored = is_ignored(labels, tuple(ignore_index))
    stray = is_ignored(labels, (), num_classes)
    dead = ignored | stray | (region < 0) | (region >= num_regions)
    rank = labels
    if background is not None and is_class(background, num_classes):
        rank = torch.where(labels == background, 0, labels + (labels < background))
    key = torch.where(dead, num_regions * num_classes, region * num_classes + rank)
    key = key.to(index_dtype(num_regions * num_classes))
    key, order = torch.sort(key, stable=True)
    segments = torch.arange(num_regions * num_classes + 1, dtype=key.dtype, device=key.device)
    return order.to(dtype), torch.searchsorted(key, segments).to(dtype), (stray & ~ignored).sum()


def _class_intervals(offsets: Tensor, n: int, num_classes: int, background_ranked: bool) -> tuple[Tensor, ...]:
    offsets = offsets.to(index_dtype(n)).contiguous()
    if native.serves(offsets):
        return native.class_intervals(offsets, n, num_classes, background_ranked)
    return _class_intervals_in_torch(offsets, n, num_classes, background_ranked)


def _class_intervals_in_torch(offsets: Tensor, n: int, num_classes: int, background_ranked: bool) -> tuple[Tensor, ...]:
    rows = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    alive = (segment < offsets.numel() - 1) & (rows >= offsets[0])
    segment = segment * alive
    ends = offsets[num_classes::num_classes]
    anchor_start = offsets[1::num_classes] if background_ranked else offsets[:-1:num_classes]
    bounds = (anchor_start, ends, offsets[:-1:num_classes], ends)
    # Copies: an operator's outputs may not alias.
    return offsets[segment] * alive, offsets[segment + 1] * alive, rows, *(bound.clone() for bound in bounds)


def _label_sort(
    labels: Tensor,
    ids: Tensor | None,
    spatial: list[int],
    size: list[int],
    per_image: bool,
    num_regions: int,
    background: int | None,
    ignore_index: list[int],
) -> tuple[Tensor, ...]:
    labels = labels.reshape(-1)
    n, dtype = labels.numel(), index_dtype(labels.numel())
    if labels.device.type == "cpu" and _is_countable(labels, num_regions, ignore_index):
        # On the host the range of the labels may be looked at; where it is short, they are counted, not compared.
        typed = _of_types(labels, torch.uint8)
        lowest, highest = (int(bound) for bound in typed.aminmax())
        classes = range(lowest, highest + 1)
        if num_regions * (highest - lowest + 1) <= min(n + _FEW_SEGMENTS, native.MAX_SEGMENTS):
            order, offsets, _ = native.class_sort(
                typed, _ids_like(labels, ids), spatial, size, per_image,
                num_regions, classes, background, ignore_index, dtype,
            )  # fmt: skip
            return order, *native.class_intervals(offsets, n, len(classes), background in classes)
    region = _region_of_pixel(labels, ids, spatial, size, per_image)
    return _label_sort_in_torch(labels, region, num_regions, background, ignore_index)


_FEW_SEGMENTS = 4096  # counted in no time even for few pixels


def _label_sort_in_torch(
    labels: Tensor, region: Tensor, num_regions: int, background: int | None, ignore_index: Sequence[int]
) -> tuple[Tensor, ...]:
    labels, dtype = labels.long(), index_dtype(labels.numel())
    dead = is_ignored(labels, tuple(ignore_index)) | (region < 0) | (region >= num_regions)
    region = torch.where(dead, num_regions, region)
    rank = labels if background is None else torch.where(labels == background, LOWEST, labels)
    rank = torch.where(dead, 0, rank)  # the dead by pixel, as a counting sort leaves them
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
    bounds = (anchor_start, offsets[1:], offsets[:-1], offsets[1:])
    # Copies: an operator's outputs may not alias.
    intervals = (pos_start * alive, pos_end * alive, rows, *(bound.clone() for bound in bounds))
    return order.to(dtype), *(interval.to(dtype) for interval in intervals)


def _pair_counts(*intervals: Tensor) -> tuple[Tensor, Tensor]:
    dtypes = {interval.dtype for interval in intervals}
    if len(dtypes) == 1 and native.serves(intervals[0]):
        return native.pair_counts([interval.contiguous() for interval in intervals])
    return _pair_counts_in_torch(Pairs.from_intervals(intervals))


def _pair_counts_in_torch(pairs: Pairs) -> tuple[Tensor, Tensor]:
    region, anchor = pairs.region(), pairs.is_anchor()
    key_start, key_end = pairs.key_start[region], pairs.key_end[region]
    own_class = pairs.pos_end - pairs.pos_start
    self_is_key = (pairs.self_pos >= key_start) & (pairs.self_pos < key_end)
    positives = own_class - pairs.self_is_positive().to(own_class.dtype)
    others = key_end - key_start - self_is_key.to(own_class.dtype)
    return positives * anchor, (others - positives) * anchor


def _ids_like(labels: Tensor, ids: Tensor | None) -> Tensor | None:
    """The region of each of the labels, as the native library reads them."""
    if ids is None:
        return None
    if ids.numel() != labels.numel():
        raise ValueError(f"regions must have one id for each of {labels.numel()} labels, got {ids.numel()}")
    return _of_types(ids.reshape(-1).to(labels.device))


def _of_types(values: Tensor, *more: torch.dtype) -> Tensor:
    """Contiguous integers of a type that the native library reads."""
    return (values if values.dtype in (torch.int32, torch.int64, *more) else values.long()).contiguous()


def _fake_class_sort(
    labels: Tensor, ids: Tensor | None, spatial: list[int], size: list[int], per_image: bool, num_regions: int,
    num_classes: int, background: int | None, ignore_index: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    n = labels.numel()
    dtype = index_dtype(n)
    offsets = labels.new_empty(num_regions * num_classes + 1, dtype=dtype)
    return labels.new_empty(n, dtype=dtype), offsets, labels.new_empty((), dtype=torch.int64)


def _fake_class_intervals(offsets: Tensor, n: int, num_classes: int, background_ranked: bool) -> tuple[Tensor, ...]:
    num_regions = (offsets.numel() - 1) // num_classes
    return tuple(offsets.new_empty(size, dtype=index_dtype(n)) for size in [n] * 3 + [num_regions] * 4)


def _fake_label_sort(
    labels: Tensor, ids: Tensor | None, spatial: list[int], size: list[int], per_image: bool, num_regions: int,
    background: int | None, ignore_index: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    n = labels.numel()
    return tuple(labels.new_empty(size, dtype=index_dtype(n)) for size in [n] * 4 + [num_regions] * 4)


def _fake_pair_counts(*intervals: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(intervals[0]), torch.empty_like(intervals[0])


_REGIONS = "Tensor? regions, SymInt[] spatial, SymInt[] size, bool per_image, SymInt num_regions"
_BOUNDS = ", ".join(f"Tensor {name}" for name in FIELDS[1:])
register(
    "class_sort",
    f"(Tensor labels, {_REGIONS}, int num_classes, int? background, int[] ignore_index)"
    " -> (Tensor order, Tensor offsets, Tensor outside)",
    _class_sort,
    _fake_class_sort,
)
register(
    "label_sort",
    f"(Tensor labels, {_REGIONS}, int? background, int[] ignore_index) -> (Tensor order, {_BOUNDS})",
    _label_sort,
    _fake_label_sort,
)
register(
    "class_intervals",
    f"(Tensor offsets, SymInt n, int num_classes, bool background_ranked) -> ({_BOUNDS})",
    _class_intervals,
    _fake_class_intervals,
)
register("pair_counts", f"({_BOUNDS}) -> (Tensor positives, Tensor negatives)", _pair_counts, _fake_pair_counts)


# ---- partitions of other kinds


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
