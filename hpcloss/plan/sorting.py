"""The operators of a partition: sorting pixels by (region, class), the resulting intervals, and their counts.

Each calls the native library if it can, otherwise the PyTorch implementation here. Results are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import register
from hpcloss.plan import native
from hpcloss.plan.labels import is_class, is_ignored
from hpcloss.plan.regions import Grid

INT32_MAX = 2**31 - 1


def index_dtype(count: int) -> torch.dtype:
    """int32 if row numbers fit, otherwise int64."""
    return torch.int32 if count <= INT32_MAX else torch.int64


def changes(values: Tensor) -> Tensor:
    """Rows whose value differs from the row before; the first row counts as a change."""
    changed = torch.ones_like(values, dtype=torch.bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def segment_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """First row and one past the last row of the segment of each row. `starts` marks first rows; row 0 is one."""
    # A running count and copies: on a GPU, cummax and cummin of one dimension run in one block.
    segment, rows = torch.cumsum(starts, 0), torch.arange(starts.numel(), device=starts.device)
    # Segments are numbered from 1. Number 0 takes the rows that begin no segment. It is not read.
    first = torch.full((starts.numel() + 2,), starts.numel(), device=starts.device)
    first = first.scatter_(0, torch.where(starts, segment, 0), rows)
    return first[segment], first[segment + 1]


# ---- operators


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
    if offsets.numel() <= native.MAX_SEGMENTS and native.serves(offsets):
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
    if _is_countable(labels, 2 * num_regions, ignore_index):
        return native.label_sort(
            _of_types(labels, torch.uint8), _ids_like(labels, ids), spatial, size,
            per_image, num_regions, background, ignore_index, index_dtype(labels.numel()),
        )  # fmt: skip
    region = _region_of_pixel(labels, ids, spatial, size, per_image)
    return _label_sort_in_torch(labels, region, num_regions, background, ignore_index)


def _label_sort_in_torch(
    labels: Tensor, region: Tensor, num_regions: int, background: int | None, ignore_index: Sequence[int]
) -> tuple[Tensor, ...]:
    labels, dtype = labels.long(), index_dtype(labels.numel())
    dead = is_ignored(labels, tuple(ignore_index)) | (region < 0) | (region >= num_regions)
    # Background is first in its region. Dead rows are last and by pixel, as in a counting sort.
    part = 2 * region + (1 if background is None else labels != background)
    part, labels = torch.where(dead, 2 * num_regions, part), torch.where(dead, 0, labels)
    by_label = torch.sort(labels, stable=True).indices
    order = by_label[torch.sort(part[by_label], stable=True).indices]
    part, labels = part[order], labels[order]
    rows = torch.arange(order.numel(), device=order.device)
    alive = part < 2 * num_regions
    pos_start, pos_end = segment_bounds(changes(part) | changes(labels))
    offsets = torch.searchsorted(part, torch.arange(2 * num_regions + 1, device=part.device))
    bounds = (offsets[1::2], offsets[2::2], offsets[:-1:2], offsets[2::2])
    # Copies: an operator's outputs may not alias.
    intervals = (pos_start * alive, pos_end * alive, rows, *(bound.clone() for bound in bounds))
    return order.to(dtype), *(interval.to(dtype) for interval in intervals)


def _pair_counts(*intervals: Tensor) -> tuple[Tensor, Tensor]:
    if _is_of_one_type(intervals) and native.serves(intervals[0]):
        return native.pair_counts([interval.contiguous() for interval in intervals])
    return _pair_counts_in_torch(*intervals)


def _pair_counted(*arguments: Any) -> Tensor:
    *intervals, need_negatives = arguments
    if _is_of_one_type(intervals) and native.serves(intervals[0]):
        return native.pair_counted([interval.contiguous() for interval in intervals], need_negatives)
    positives, negatives = _pair_counts_in_torch(*intervals)
    return (torch.minimum(positives, negatives) if need_negatives else positives) > 0


def _is_of_one_type(intervals: Sequence[Tensor]) -> bool:
    return len({interval.dtype for interval in intervals}) == 1


def _pair_counts_in_torch(
    pos_start: Tensor,
    pos_end: Tensor,
    self_pos: Tensor,
    anchor_start: Tensor,
    anchor_end: Tensor,
    key_start: Tensor,
    key_end: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(pos_start.numel(), dtype=anchor_end.dtype, device=pos_start.device)
    region = torch.searchsorted(anchor_end, rows, right=True).clamp_(max=anchor_end.numel() - 1)
    anchor = (rows >= anchor_start[region]) & (rows < anchor_end[region])
    start, end, own_class = key_start[region], key_end[region], pos_end - pos_start
    self_is_key = (self_pos >= start) & (self_pos < end)
    self_is_positive = (self_pos >= pos_start) & (self_pos < pos_end)
    positives = own_class - self_is_positive.to(own_class.dtype)
    others = end - start - self_is_key.to(own_class.dtype)
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


def _fake_pair_counted(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0], dtype=torch.bool)


_REGIONS = "Tensor? regions, SymInt[] spatial, SymInt[] size, bool per_image, SymInt num_regions"
_BOUNDS = "Tensor pos_start, Tensor pos_end, Tensor self_pos"
_BOUNDS += ", Tensor anchor_start, Tensor anchor_end, Tensor key_start, Tensor key_end"
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
register("pair_counted", f"({_BOUNDS}, bool need_negatives) -> Tensor", _pair_counted, _fake_pair_counted)
