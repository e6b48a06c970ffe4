"""The contrast row by row in the native library: CPU, fp32. One pass over each row, without mask or padding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hpcloss.backends import library
from hpcloss.backends.arithmetic import LOG2E
from hpcloss.backends.dense.batches import MOST, Region, regions_of
from hpcloss.backends.dense.forms import Options
from hpcloss.plan import native
from hpcloss.plan.partition import Intervals


def is_native(anchors: Tensor) -> bool:
    """Whether the native library computes these rows."""
    return anchors.dtype == torch.float32 and anchors.device.type == "cpu" and native.serves(anchors)


def readable(at: Intervals) -> Intervals:
    """The intervals as the library reads them: without gaps, and of one type."""
    kind = at.pos_start.dtype
    if all([bound.is_contiguous() and bound.dtype == kind for bound in at[:3]]):
        return at
    return Intervals(*[bound.to(torch.int64).contiguous() for bound in at])


def native_contrast(
    anchors: Tensor,
    keys: Tensor | None,
    at: Intervals,
    scale: Tensor,
    options: Options,
    needs_slopes: bool,
    kept: Tensor,
    by_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses [N], and which anchors count [N].

    Slopes go into `kept`, group by group, and scale * d loss / d scale into `by_scale`, unless these are empty.
    """
    call = Call(anchors, at, scale, options, by_scale, needs_slopes)
    others, first = anchors if keys is None else keys, 0
    for group in groups(regions_of(at)):
        size = math.prod(group.shape())
        call.slopes(group, anchors, others, part(kept, slice(first, first + size)) if kept.numel() else None)
        first += size
    return call.loss, call.counted


def native_gradients(
    kept: Tensor,
    of_pairs: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    at: Intervals,
    scale: Tensor,
    options: Options,
    needs_anchors: bool,
    needs_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of anchors and keys for slopes times of_pairs [N]. Slopes that were not kept are computed again."""
    others, regions = anchors if keys is None else keys, regions_of(at)
    call, first = None if kept.numel() else Call(anchors, at, scale, options, anchors.new_empty(0)), 0
    if regions == [(0, anchors.shape[0], 0, others.shape[0])] and (needs_anchors or needs_keys):
        whole = Group(regions[0])
        slope = kept.view(whole.shape()) if call is None else call.slopes(whole, anchors, others)
        return _of_whole(slope, of_pairs, anchors, keys, needs_anchors, needs_keys)
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    for group in groups(regions) if needs_anchors or needs_keys else ():
        rows, columns, shape = group.anchors(), group.keys(), group.shape()
        if call is None:
            slope = kept[first : first + math.prod(shape)].view(shape)
            first += math.prod(shape)
        else:
            slope = call.slopes(group, anchors, others)
        if keys is None and rows == columns:
            if d_anchors is not None:
                write_both(slope, of_pairs[rows], others[rows], group.number, d_anchors[rows])
        else:
            _add_sides(group, slope, of_pairs[rows], anchors, others, d_anchors, d_keys)
    return d_anchors, d_keys


def _of_whole(
    slope: Tensor, factor: Tensor, anchors: Tensor, keys: Tensor | None, needs_anchors: bool, needs_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for slopes times a factor of each row, if one region holds all rows: nothing is added or cut."""
    if keys is None:
        gradient = torch.empty_like(anchors)
        write_both(slope, factor, anchors, 1, gradient)
        return gradient, gradient
    factor = factor[:, None]
    return (
        torch.mm(slope, keys).mul_(factor) if needs_anchors else None,
        torch.mm(slope.T, anchors * factor) if needs_keys else None,
    )


def _add_sides(
    group: Group,
    slope: Tensor,
    factor: Tensor,
    anchors: Tensor,
    others: Tensor,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
) -> None:
    """Add the gradients of a group for slopes times a factor of each row."""
    rows, columns = group.anchors(), group.keys()
    if group.number == 1:
        weighted = anchors[rows] * factor[:, None]
        if d_anchors is not None and d_anchors is not d_keys:
            torch.mm(slope, others[columns], out=d_anchors[rows]).mul_(factor[:, None])
        elif d_anchors is not None:
            d_anchors[rows] += torch.mm(slope, others[columns]).mul_(factor[:, None])
        if d_keys is not None:
            d_keys[columns].addmm_(slope.T, weighted)
        return
    slope, own, other, of_rows = map(group.cut, (slope, anchors[rows], others[columns], factor[:, None]))
    if d_anchors is not None:
        group.cut(d_anchors[rows]).add_(torch.bmm(slope, other).mul_(of_rows))
    if d_keys is not None:
        group.cut(d_keys[columns]).baddbmm_(slope.mT, own * of_rows)


def add_gradients(
    group: Group, slope: Tensor, anchors: Tensor, keys: Tensor | None, d_anchors: Tensor | None, d_keys: Tensor | None
) -> None:
    """Add the gradients of a group for slopes as they are."""
    rows, one = group.anchors(), slope.new_ones(slope.shape[0])
    if keys is None and rows == group.keys():
        if d_anchors is not None:
            write_both(slope, one, anchors[rows], group.number, d_anchors[rows])
    else:
        _add_sides(group, slope, one, anchors, anchors if keys is None else keys, d_anchors, d_keys)


def write_both(slope: Tensor, factor: Tensor, rows: Tensor, number: int, gradient: Tensor) -> None:
    """The gradient of rows that are each other's anchors and keys. slope: of `number` regions."""
    both, length = torch.empty_like(slope), slope.shape[1]
    for first in range(0, slope.shape[0], length):
        region = slice(first, first + length)
        library.add_transpose(part(slope, region), part(factor, region), part(both, region))
    if number == 1:
        torch.mm(both, rows, out=gradient)
    else:
        both, rows, gradient = (x.view(number, length, -1) for x in (both, rows, gradient))
        torch.bmm(both, rows, out=gradient)


def part(values: Tensor, rows: slice) -> Tensor:
    """Some rows. All rows are returned without a slice, which takes as long as a small product."""
    return values if rows.start == 0 and rows.stop == values.shape[0] else values[rows]


class Group:
    """Consecutive regions of one shape."""

    def __init__(self, first: Region):
        self.first, self.number = first, 1

    def takes(self, region: Region) -> bool:
        """Add the next region, if it fits."""
        n, m = self.first.shape()
        behind = self.first.anchor_start + self.number * n, self.first.key_start + self.number * m
        fits = region.shape() == (n, m) and (region.anchor_start, region.key_start) == behind
        if not fits or (self.number + 1) * n * m > MOST:
            return False
        self.number += 1
        return True

    def anchors(self) -> slice:
        """The anchors of all regions."""
        start = self.first.anchor_start
        return slice(start, start + self.number * (self.first.anchor_end - start))

    def keys(self) -> slice:
        """The keys of all regions."""
        start = self.first.key_start
        return slice(start, start + self.number * (self.first.key_end - start))

    def shape(self) -> tuple[int, int]:
        """Anchors of all regions, and keys of each."""
        n, m = self.first.shape()
        return self.number * n, m

    def logits(self, anchors: Tensor, others: Tensor, factor: float, into: Tensor | None = None) -> Tensor:
        """The similarities times a factor [anchors, keys], in `into` if given."""
        rows, columns, shape = self.anchors(), self.keys(), self.shape()
        logits = anchors.new_empty(shape) if into is None else into.view(shape)
        own, other = part(anchors, rows), part(others, columns)
        if self.number == 1:
            return torch.addmm(logits, own, other.T, beta=0, alpha=factor, out=logits)
        batch, own, other = map(self.cut, (logits, own, other))
        torch.baddbmm(batch, own, other.mT, beta=0, alpha=factor, out=batch)
        return logits

    def cut(self, values: Tensor) -> Tensor:
        """Rows of all regions, consecutive by region."""
        return values.view(self.number, -1, values.shape[1])


def native_logits(
    anchors: Tensor, keys: Tensor | None, at: Intervals, scale: Tensor
) -> Iterator[tuple[Group, tuple[Tensor, library.Rows]]]:
    """Each group with its logits to base 2, as the library's functions of log-sum-exps take them."""
    at, others, factor = readable(at), anchors if keys is None else keys, float(scale) * LOG2E
    for group in groups(regions_of(at)):
        logits, rows, columns = group.logits(anchors, others, factor), group.anchors(), group.keys()
        length = logits.shape[0] // group.number
        yield group, library.rows_of(logits, length, columns.start, at[:3], rows.start)


def groups(regions: list[Region]) -> Iterator[Group]:
    """As many consecutive regions of one shape at a time as fit in a batch."""
    group: Group | None = None
    for region in regions:
        if group is None or not group.takes(region):
            if group is not None:
                yield group
            group = Group(region)
    if group is not None:
        yield group


class Call:
    """The arguments of a call of the library, and the losses that it computes."""

    def __init__(
        self,
        anchors: Tensor,
        at: Intervals,
        scale: Tensor,
        options: Options,
        by_scale: Tensor,
        needs_slopes: bool = True,
    ):
        number = float(scale)
        over = 1 / number if number else 0.0  # with scale 0 there are no logits to weigh by
        self.factor, self.bounds, self.needs_slopes = number * LOG2E, readable(at)[:3], needs_slopes
        self.options = library.contrast_options(
            options.denominator, bool(options.hardness) and not options.detach_weights, -options.hardness * over,
            options.discount * over, math.log2(options.multiplicity),
        )  # fmt: skip
        self.loss = anchors.new_zeros(anchors.shape[0])
        self.counted = torch.zeros_like(self.loss, dtype=torch.bool)
        self.by_scale = by_scale if by_scale.numel() else None

    def slopes(self, group: Group, anchors: Tensor, others: Tensor, kept: Tensor | None = None) -> Tensor:
        """The slopes of a group's rows [rows, keys], in `kept` if given."""
        logits = group.logits(anchors, others, self.factor, kept)
        library.contrast(
            logits, logits.shape[0] // group.number, group.keys().start, self.bounds, group.anchors().start,
            self.options, self.needs_slopes, self.loss, self.counted, self.by_scale,
        )  # fmt: skip
        return logits
