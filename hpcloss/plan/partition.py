"""Which pairs count: pixels sorted by (region, class), and the intervals that the sort leaves behind.

After a stable sort by (region, label), background first in its region and ignored pixels last, the keys an anchor may
meet are one interval (its region), its positives are one sub-interval (its class), and the anchors of a region are one
interval too. "Which pairs count" is then arithmetic on row numbers; no label matrix exists anywhere.

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

MOST_KEPT = 1 << 10  # anchors of a plan that is kept


class Intervals(NamedTuple):
    """Which of M keys each of N anchors meets, as intervals of key rows (M = N in self-contrast).

    pos_start, pos_end [N]      the keys of the row's own class: its positives, itself included where it is a key.
    self_pos [N]                the key row that is this anchor, -1 for none. A row never meets itself.
    anchor_start, anchor_end [R]  the rows of each region that are anchors, in ascending order of regions.
    key_start, key_end [R]      the keys that the anchors of the region may meet; these may come in any order.

    All int32 (int64 beyond 2^31 rows). Rows in no anchor interval are keys only, or dead.
    """

    pos_start: Tensor
    pos_end: Tensor
    self_pos: Tensor
    anchor_start: Tensor
    anchor_end: Tensor
    key_start: Tensor
    key_end: Tensor

    def replace(self, **changes: Tensor) -> Intervals:
        """As `_replace`, which breaks graphs on older torch."""
        return Intervals(*[changes[name] if name in changes else getattr(self, name) for name in FIELDS])

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
        return ops.pair_counts(*self)

    def counted(self, *, need_negatives: bool = False) -> Tensor:
        """Whether each row has a positive [N], and a negative if asked; False for rows that are no anchors."""
        return ops.pair_counted(*self, need_negatives)


FIELDS = Intervals._fields


class Pairs(NamedTuple):
    """The pairs of anchors and keys that count.

    order [N]    flat pixel index of each anchor row, int32 (int64 beyond 2^31 rows).
    intervals    the keys of each anchor row.
    """

    order: Tensor
    intervals: Intervals

    def replace(self, order: Tensor | None = None, **bounds: Tensor) -> Pairs:
        """The same pairs but for the order, or for fields of the intervals."""
        return Pairs(self.order if order is None else order, self.intervals.replace(**bounds))

    def to(self, device: torch.device) -> Pairs:
        """The same pairs on a device."""
        return Pairs(self.order.to(device), Intervals(*[bound.to(device) for bound in self.intervals]))

    def live(self) -> Tensor:
        """Number of leading rows that are anchors or keys, [1]; the rest of the order is dead."""
        return self.intervals.anchor_end[-1:]

    def head(self, count: int) -> Pairs:
        """The first rows alone, where it is known that the rest is dead."""
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
    """Sort pixels by (region, label) and return the self-contrast `Pairs` of the sorted rows.

    labels: any shape, any integers. regions: a grid, or the region of each pixel [N] and their number; ids outside
    [0, num_regions) remove the pixel. Ignored and removed pixels are the dead tail of the order. `background` sorts
    first in its region and is no anchor. With `num_classes` labels outside [0, num_classes) are ignored too, and a
    counting sort in the native library gives the same order as the sorts without it.
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
    """Pixels sorted by (region, class); segment r * num_classes + c holds class number c of region r.

    order [N]                          flat pixel index of each row; ignored pixels are the tail.
    offsets [R * num_classes + 1]      first row of each segment; the last is the number of rows that are not ignored.
    num_classes                        C. background_first: class number 0 is the background, a key and no anchor.
    outside []                         number of pixels whose label is no class and not ignored, where it is known.
    """

    order: Tensor
    offsets: Tensor
    num_classes: int
    background_first: bool = False
    outside: Tensor | None = None

    def live(self) -> Tensor:
        """Number of leading rows that are not ignored, [1]; the rest of the order is dead."""
        return self.offsets[-1:]

    def replace(self, **changes: Any) -> ClassRows:
        """As `_replace`, which breaks graphs on older torch."""
        return ClassRows(*[changes[name] if name in changes else getattr(self, name) for name in CLASS_FIELDS])

    def region(self, number: int) -> ClassRows:
        """The segments of one region."""
        first = number * self.num_classes
        return self.replace(offsets=self.offsets[first : first + self.num_classes + 1])

    def segment_of_row(self) -> Tensor:
        """The segment of each row [N]; the number of segments for the dead tail."""
        rows = torch.arange(self.order.numel(), dtype=self.offsets.dtype, device=self.order.device)
        return torch.searchsorted(self.offsets[1:], rows, right=True)

    def sampled(self, k: int | None, largest: int | None = None) -> ClassRows:
        """At most k rows of each segment, drawn uniformly with torch's generator; None: all of them.

        The order is the sort's own, of every pixel. largest: most pixels that a segment can hold; by default the
        number of pixels. The result has room for min(k, largest) rows a segment.
        """
        pixels = self.order.numel()
        if k is None or pixels == 0:
            return self
        order, offsets = draw(self.order, self.offsets, min(k, pixels if largest is None else largest), pixels)
        return self.replace(order=order, offsets=offsets)

    def pairs(self) -> Pairs:
        """Self-contrast: rows meet the rows of their region, and those of their class are positives."""
        intervals = ops.class_intervals(self.offsets, self.order.numel(), self.num_classes, self.background_first)
        return Pairs(self.order.to(index_dtype(self.order.numel())), Intervals(*intervals))

    def against(self, keys: ClassRows) -> Pairs:
        """Anchors of these rows and other keys, sorted by the same regions and classes.

        An anchor meets the keys of its region, and its positives are the keys of its class. No key is an anchor itself.
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
    """Stable counting sort of pixels by (region, class); arguments as for `partition`, order and offsets int32 (int64
    beyond 2^31 rows), outside int64."""
    ids, spatial, size, per_image, num_regions = _regions(labels, regions, num_regions)
    arguments = (labels, ids, spatial, size, per_image, num_regions, num_classes, background, ignore_index)
    order, offsets, outside = ops.class_sort(*arguments)
    return ClassRows(order, offsets, num_classes, is_class(background, num_classes), outside)


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
    """Anchors with `labels` [N] against other keys with `key_labels` [M]; keys of one class become one interval.

    key_regions [M]: keys outside region 0 are removed. Returns the `Pairs` (rows in ascending order, ignored anchors
    meet no key) and the order [M] in which to pack the keys: sorted by label, ignored keys last. Anchors are in no way
    among the keys, so nothing is "self".
    """
    keys = partition(key_labels, key_regions, ignore_index=ignore_index)
    anchors = partition(labels, ignore_index=ignore_index)
    live = keys.intervals.key_end[-1:]
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


def paired(pairs: Pairs, partner: Tensor) -> Pairs:
    """The same anchors and keys with one explicit positive each: `partner` [N] is its key row."""
    return pairs.replace(pos_start=partner.to(pairs.order.dtype), pos_end=(partner + 1).to(pairs.order.dtype))


def one_to_one(count: int, device: torch.device) -> Pairs:
    """Anchor i with key i as its positive and all other keys as negatives; anchors are not among the keys."""
    return _known(_one_to_one, count, device)


def two_by_two(count: int, device: torch.device) -> Pairs:
    """Two views of `count` images, as `partition` sorts them by image; each row's only positive is its image's other.

    The order is that of torch.cat([view1, view2]): rows 2 i and 2 i + 1 are those of image i.
    """
    return _known(_two_by_two, count, device)


def _known(make: Callable[[int, torch.device], Pairs], count: int, device: torch.device) -> Pairs:
    """A plan that follows from a number alone. Of small problems on the CPU it is kept from step to step."""
    plain = not (is_traced() or torch.is_inference_mode_enabled())
    return _kept(make, count) if plain and device.type == "cpu" and count <= MOST_KEPT else make(count, device)


@functools.lru_cache(maxsize=16)
def _kept(make: Callable[[int, torch.device], Pairs], count: int) -> Pairs:
    return make(count, torch.device("cpu"))


def _one_to_one(count: int, device: torch.device) -> Pairs:
    rows = torch.arange(count, dtype=index_dtype(count), device=device)
    # No tensor twice: an operator's inputs may not alias.
    return Pairs(rows, Intervals(rows.clone(), rows + 1, torch.full_like(rows, -1), *_one_region(rows)))


def _two_by_two(count: int, device: torch.device) -> Pairs:
    rows = torch.arange(2 * count, dtype=index_dtype(2 * count), device=device)
    partner = rows ^ 1
    return Pairs(rows.view(2, count).T.flatten(), Intervals(partner, partner + 1, rows, *_one_region(rows)))


def _one_region(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bounds of a region that holds all rows, as anchors and as keys."""
    count = rows.numel()
    return rows.new_zeros(1), rows.new_full((1,), count), rows.new_zeros(1), rows.new_full((1,), count)
