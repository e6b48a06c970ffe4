"""Which pairs count: pixels sorted by (region, class), and the intervals that the sort gives.

The sort is stable. The background is first in its region, ignored pixels are last. Then the keys of an anchor are one
interval of rows (its region), its positives are one part of it (its class), and the anchors of a region are one
interval too. Row numbers say which pairs count; no label matrix exists.

Nothing here reads device data on the host and every shape is static, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.operators import is_traced, ops
from hpcloss.plan.draw import draw
from hpcloss.plan.labels import is_class
from hpcloss.plan.native import MAX_AXES
from hpcloss.plan.regions import Grid
from hpcloss.plan.sorting import index_dtype

MOST_KEPT = 1 << 10  # anchors of the largest plan that is kept


class Intervals(NamedTuple):
    """The keys of each of N anchors, as intervals of M key rows (M = N in self-contrast).

    All are int32 (int64 beyond 2^31 rows). A row in no anchor interval is a key only, or dead.

    Attributes:
        pos_start: First key of the row's own class `[N]`. The row itself is among them if it is a key.
        pos_end: Key after the last one of the row's own class `[N]`.
        self_pos: Key row that is this anchor `[N]`, -1 for none. A row is never its own positive or negative.
        anchor_start: First row of each region that is an anchor `[R]`, ascending.
        anchor_end: Row after the last anchor of each region `[R]`.
        key_start: First key of the region's anchors `[R]`. Key intervals may come in any order.
        key_end: Key after the last one of the region's anchors `[R]`.
    """

    pos_start: Tensor
    pos_end: Tensor
    self_pos: Tensor
    anchor_start: Tensor
    anchor_end: Tensor
    key_start: Tensor
    key_end: Tensor

    def replace(self, **changes: Tensor) -> Intervals:
        """The same intervals with other values of some fields.

        Args:
            **changes: New tensors by name of the field.
        """
        return Intervals(*[changes[name] if name in changes else getattr(self, name) for name in FIELDS])

    def region(self) -> Tensor:
        """Region of each row `[N]`. A row that is no anchor gets any region."""
        rows = torch.arange(self.pos_start.numel(), dtype=self.anchor_end.dtype, device=self.pos_start.device)
        return torch.searchsorted(self.anchor_end, rows, right=True).clamp_(max=self.anchor_end.numel() - 1)

    def is_anchor(self) -> Tensor:
        """Whether each row is an anchor `[N]`."""
        region = self.region()
        rows = torch.arange(self.pos_start.numel(), device=self.pos_start.device)
        return (rows >= self.anchor_start[region]) & (rows < self.anchor_end[region])

    def self_is_positive(self) -> Tensor:
        """Whether the row's own key is in its positive interval `[N]`."""
        return (self.self_pos >= self.pos_start) & (self.self_pos < self.pos_end)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Number of positives and number of negatives of each row `[N]`. Both are 0 for a row that is no anchor."""
        return ops.pair_counts(*self)

    def counted(self, *, need_negatives: bool = False) -> Tensor:
        """Whether each row has a positive `[N]`. False for a row that is no anchor.

        Args:
            need_negatives: Also require a negative.
        """
        return ops.pair_counted(*self, need_negatives)


FIELDS = Intervals._fields


class Pairs(NamedTuple):
    """The pairs of anchors and keys that count, as `partition` gives them.

    Attributes:
        order: Flat pixel index of each row `[N]`, int32 (int64 beyond 2^31 rows). `pack` gathers rows in this order.
        intervals: The keys of each row.
    """

    order: Tensor
    intervals: Intervals

    def replace(self, order: Tensor | None = None, **bounds: Tensor) -> Pairs:
        """The same pairs with another order or other intervals.

        Args:
            order: The new order `[N]`. None: the same.
            **bounds: New fields of the intervals by name.
        """
        return Pairs(self.order if order is None else order, self.intervals.replace(**bounds))

    def to(self, device: torch.device) -> Pairs:
        """The same pairs on a device.

        Args:
            device: The device.
        """
        return Pairs(self.order.to(device), Intervals(*[bound.to(device) for bound in self.intervals]))

    def live(self) -> Tensor:
        """Number of leading rows that are anchors or keys `[1]`. The other rows are dead."""
        return self.intervals.anchor_end[-1:]

    def head(self, count: int) -> Pairs:
        """The first rows. All rows from there on must be dead.

        Args:
            count: Number of rows to keep.
        """
        at = self.intervals
        return self.replace(
            order=self.order[:count],
            pos_start=at.pos_start[:count],
            pos_end=at.pos_end[:count],
            self_pos=at.self_pos[:count],
        )


def partition(
    labels: Tensor,
    regions: Tensor | Grid | None = None,
    num_regions: int = 1,
    *,
    background: int | None = None,
    ignore_index: tuple[int, ...] = (),
    num_classes: int | None = None,
) -> Pairs:
    """Sort pixels by (region, label) and return the self-contrast pairs of the sorted rows.

    The positives of a row are the other rows of its region with its label. The negatives are the rows of its region
    with another label.

    Args:
        labels: Integers of any shape, N of them.
        regions: A `Grid`, or the region of each pixel `[N]`. A region outside [0, num_regions) removes the pixel. None:
            all pixels are one region.
        num_regions: Number of regions of a tensor.
        background: Label of pixels that are keys and never anchors. None: every label has anchors.
        ignore_index: Labels of pixels that are neither anchors nor keys.
        num_classes: Number of classes C. Labels outside [0, C) are then ignored too, and the sort is faster. The order
            is the same. None: any integer is a class.

    Returns:
        `Pairs` of N rows. Ignored and removed pixels are the dead rows at the end.

    Raises:
        ValueError: The regions do not fit the labels, or `num_regions` is below 1.

    Examples:
        >>> import torch
        >>> from hpcloss.plan.partition import partition
        >>> pairs = partition(torch.tensor([7, 3, 7, 255]), ignore_index=(255,))
        >>> pairs.order.tolist(), [n.tolist() for n in pairs.intervals.counts()]
        ([1, 0, 2, 3], [[0, 1, 1, 0], [2, 1, 1, 0]])
    """
    if num_classes is not None:
        return class_sort(
            labels, regions, num_regions, background=background, ignore_index=ignore_index, num_classes=num_classes
        ).pairs()
    ids, spatial, size, per_image, num_regions = _regions(labels, regions, num_regions)
    arguments = (labels, ids, spatial, size, per_image, num_regions, background, ignore_index)
    order, *intervals = ops.label_sort(*arguments)
    return Pairs(order, Intervals(*intervals))


class ClassRows(NamedTuple):
    """Pixels sorted by (region, class). Segment r * C + c has the pixels of class c in region r.

    Attributes:
        order: Flat pixel index of each row `[N]`. Ignored pixels are at the end.
        offsets: First row of each segment `[R * C + 1]`. The last is the number of rows that are not ignored.
        num_classes: Number of classes C.
        background_first: The first class is the background, which gives keys and no anchors.
        outside: Number of pixels whose label is neither a class nor ignored [], or None if it is not known.
    """

    order: Tensor
    offsets: Tensor
    num_classes: int
    background_first: bool = False
    outside: Tensor | None = None

    def live(self) -> Tensor:
        """Number of leading rows that are not ignored `[1]`. The other rows are dead."""
        return self.offsets[-1:]

    def replace(self, **changes: Any) -> ClassRows:
        """The same rows with other values of some fields.

        Args:
            **changes: New values by name of the field.
        """
        return ClassRows(*[changes[name] if name in changes else getattr(self, name) for name in CLASS_FIELDS])

    def region(self, number: int) -> ClassRows:
        """The segments of one region.

        Args:
            number: The region.
        """
        first = number * self.num_classes
        return self.replace(offsets=self.offsets[first : first + self.num_classes + 1])

    def segment_of_row(self) -> Tensor:
        """The segment of each row `[N]`. A dead row gets the number of segments."""
        rows = torch.arange(self.order.numel(), dtype=self.offsets.dtype, device=self.order.device)
        return torch.searchsorted(self.offsets[1:], rows, right=True)

    def sampled(self, k: int | None, largest: int | None = None) -> ClassRows:
        """At most k rows of each segment, sampled uniformly with torch's generator.

        The rows must be in the sort's own order, with every pixel.

        Args:
            k: Rows per segment. None: all rows.
            largest: Most pixels that a segment can hold. The result has room for min(k, largest) rows per segment.
                None: the number of pixels.
        """
        pixels = self.order.numel()
        if k is None or pixels == 0:
            return self
        order, offsets = draw(self.order, self.offsets, min(k, pixels if largest is None else largest), pixels)
        return self.replace(order=order, offsets=offsets)

    def pairs(self) -> Pairs:
        """The self-contrast pairs: keys are the rows of the region, and positives are those of the class."""
        intervals = ops.class_intervals(self.offsets, self.order.numel(), self.num_classes, self.background_first)
        return Pairs(self.order.to(index_dtype(self.order.numel())), Intervals(*intervals))

    def against(self, keys: ClassRows) -> Pairs:
        """The pairs of these rows as anchors and other rows as keys.

        An anchor meets the keys of its region, and its positives are the keys of its class. No key is an anchor itself.

        Args:
            keys: The keys, sorted by the same regions and classes.
        """
        offsets, dtype = self.offsets, index_dtype(max(self.order.numel(), 1))
        segment = self.segment_of_row().clamp_(max=offsets.numel() - 2)
        starts, ends = keys.offsets[:-1], keys.offsets[1:]
        classes, first = self.num_classes, int(self.background_first)
        return Pairs(
            self.order.to(dtype),
            Intervals(
                starts[segment].to(dtype),
                ends[segment].to(dtype),
                torch.full_like(segment, -1, dtype=dtype),
                offsets[first:-1:classes].to(dtype, copy=True),
                offsets[classes::classes].to(dtype, copy=True),
                starts[::classes].to(dtype, copy=True),
                ends[classes - 1 :: classes].to(dtype, copy=True),
            ),
        )


CLASS_FIELDS = ClassRows._fields


def class_sort(
    labels: Tensor,
    regions: Tensor | Grid | None = None,
    num_regions: int = 1,
    *,
    background: int | None = None,
    ignore_index: tuple[int, ...] = (),
    num_classes: int,
) -> ClassRows:
    """Sort pixels by (region, class) with a stable counting sort.

    Args:
        labels: As for `partition`.
        regions: As for `partition`.
        num_regions: As for `partition`.
        background: As for `partition`.
        ignore_index: As for `partition`.
        num_classes: Number of classes C. Labels outside [0, C) are ignored.

    Returns:
        `ClassRows` with `order` and `offsets` in int32 (int64 beyond 2^31 rows) and `outside` in int64.
    """
    ids, spatial, size, per_image, num_regions = _regions(labels, regions, num_regions)
    arguments = (labels, ids, spatial, size, per_image, num_regions, num_classes, background, ignore_index)
    order, offsets, outside = ops.class_sort(*arguments)
    return ClassRows(order, offsets, num_classes, is_class(background, num_classes), outside)


def _regions(
    labels: Tensor, regions: Tensor | Grid | None, num_regions: int
) -> tuple[Tensor | None, list[int], list[int], bool, int]:
    """Regions as the operators take them: ids, or the extents and cells of a grid; and their number."""
    if not isinstance(regions, Grid):
        if num_regions < 1:
            raise ValueError(f"num_regions must be at least 1, got {num_regions}")
        if regions is not None and regions.numel() != labels.numel():
            raise ValueError(f"regions must have one id for each of {labels.numel()} labels, got {regions.numel()}")
        return regions, [], [], False, num_regions
    if regions.batch * math.prod(regions.spatial) != labels.numel():
        raise ValueError(f"regions must have one pixel for each of {labels.numel()} labels, got {regions}")
    if len(regions.size) != len(regions.spatial) or any([cell < 1 for cell in regions.size]):
        raise ValueError(f"regions must have a size of at least 1 on every axis, got {regions}")
    if len(regions.spatial) > MAX_AXES:
        return regions.ids(labels.device), [], [], False, regions.num_regions()
    return None, list(regions.spatial), list(regions.size), regions.per_image, regions.num_regions()


# ---- partitions of other kinds


def partition_against(
    labels: Tensor, key_labels: Tensor, key_regions: Tensor | None = None, *, ignore_index: tuple[int, ...] = ()
) -> tuple[Pairs, Tensor]:
    """The pairs of labelled anchors and other labelled keys. No key is an anchor itself.

    Args:
        labels: Labels of the anchors `[N]`.
        key_labels: Labels of the keys `[M]`.
        key_regions: Region of each key `[M]`. Keys outside region 0 are removed. None: no key is removed.
        ignore_index: Labels of anchors and keys that take no part.

    Returns:
        `Pairs`, and the order `[M]` in which to pack the keys: sorted by label, ignored keys last. An ignored anchor
            has no key.
    """
    keys = partition(key_labels, key_regions, ignore_index=ignore_index)
    anchors = partition(labels, ignore_index=ignore_index)
    live = keys.intervals.key_end[-1:]
    # Dead rows get the largest integer, so the search stays inside the live keys.
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


def paired(pairs: Pairs, partner: Tensor) -> Pairs:
    """The same anchors and keys with one given positive for each anchor.

    Args:
        pairs: The pairs.
        partner: Key row of the positive of each anchor `[N]`.
    """
    return pairs.replace(pos_start=partner.to(pairs.order.dtype), pos_end=(partner + 1).to(pairs.order.dtype))


def one_to_one(count: int, device: torch.device) -> Pairs:
    """Pairs where anchor i has key i as its positive and all other keys as negatives. No key is an anchor itself.

    Args:
        count: Number of anchors and of keys.
        device: Device of the pairs.
    """
    return _known(_one_to_one, count, device)


def two_by_two(count: int, device: torch.device) -> Pairs:
    """Pairs of two views of images, sorted by image: the positive of a row is the other view of its image.

    Args:
        count: Number of images. The order is that of `torch.cat([view1, view2])`; rows 2i and 2i + 1 are image i.
        device: Device of the pairs.
    """
    return _known(_two_by_two, count, device)


def _known(make: Callable[[int, torch.device], Pairs], count: int, device: torch.device) -> Pairs:
    """A plan that depends on a number alone. Small plans on the CPU are kept from step to step."""
    plain = not (is_traced() or torch.is_inference_mode_enabled())
    return _kept(make, count) if plain and device.type == "cpu" and count <= MOST_KEPT else make(count, device)


@functools.lru_cache(maxsize=16)
def _kept(make: Callable[[int, torch.device], Pairs], count: int) -> Pairs:
    return make(count, torch.device("cpu"))


def _one_to_one(count: int, device: torch.device) -> Pairs:
    rows = torch.arange(count, dtype=index_dtype(count), device=device)
    # A copy: an operator's inputs may not alias.
    return Pairs(rows, Intervals(rows.clone(), rows + 1, torch.full_like(rows, -1), *_one_region(rows)))


def _two_by_two(count: int, device: torch.device) -> Pairs:
    rows = torch.arange(2 * count, dtype=index_dtype(2 * count), device=device)
    partner = rows ^ 1
    return Pairs(rows.view(2, count).T.flatten(), Intervals(partner, partner + 1, rows, *_one_region(rows)))


def _one_region(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds of one region with all rows as anchors and as keys."""
    count = rows.numel()
    return rows.new_zeros(1), rows.new_full((1,), count), rows.new_zeros(1), rows.new_full((1,), count)
