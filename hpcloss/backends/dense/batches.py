"""Regions side by side in one batch: their similarities are one batched product.

A batch holds R regions of n anchors and m keys. On the CPU the bounds of the regions are read. Consecutive regions of
one length are views of the rows; others are padded to the longest. On other devices nothing is read: all rows are one
region, and a mask separates the regions.

Pairs are excluded by adding a large negative number, and weighted by masks of zeros and ones. Filling with a boolean
mask takes longer than the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.plan.partition import Intervals

MOST = 1 << 20  # similarities of the largest batch, 4 MB in fp32
Where = slice | Tensor  # rows of a batch: one part of them, cut into regions, or indices [R, n]


class Region(NamedTuple):
    """The anchor rows of a region, and the keys that these may meet."""

    anchor_start: int
    anchor_end: int
    key_start: int
    key_end: int

    def shape(self) -> tuple[int, int]:
        """Its number of anchors and of keys."""
        return self.anchor_end - self.anchor_start, self.key_end - self.key_start


def regions_of(at: Intervals) -> list[Region]:
    """The regions that hold an anchor and a key. Reads the bounds, of CPU tensors."""
    bounds = (at.anchor_start, at.anchor_end, at.key_start, at.key_end)
    found = map(Region, *[bound.tolist() for bound in bounds])
    return [region for region in found if min(region.shape()) > 0]


def largest_region(at: Intervals) -> int:
    """Number of pairs of the largest region. Reads the bounds, of CPU tensors."""
    return max([n * m for n, m in map(Region.shape, regions_of(at))], default=0)


def batches(anchors: Tensor, keys: Tensor | None, at: Intervals) -> Iterator[Batch]:
    """All pairs, in batches of whole regions."""
    if not _reads(at):
        if anchors.shape[0] and (keys is None or keys.shape[0]):
            yield _everything(anchors, keys, at)
        return
    for group in _groups(regions_of(at)):
        if len({region.shape() for region in group}) == 1 and _are_adjacent(group):
            rows = slice(group[0].anchor_start, group[-1].anchor_end)
            columns = slice(group[0].key_start, group[-1].key_end)
            yield Batch(anchors, keys, at, rows, columns, len(group))
        else:
            yield _padded(anchors, keys, at, group)


def _reads(at: Intervals) -> bool:
    """Whether the host may read the bounds of regions."""
    return at.pos_start.device.type == "cpu"


def _groups(regions: list[Region]) -> Iterator[list[Region]]:
    """As many consecutive regions as fit in a batch."""
    group: list[Region] = []
    anchors = keys = 0
    for region in regions:
        n, m = region.shape()
        anchors, keys = max(anchors, n), max(keys, m)
        if group and (len(group) + 1) * anchors * keys > MOST:
            yield group
            group, anchors, keys = [], n, m
        group.append(region)
    if group:
        yield group


def _are_adjacent(group: list[Region]) -> bool:
    """Whether each region begins where the one before ends, anchors and keys alike."""
    return all(
        [
            one.anchor_end == next_.anchor_start and one.key_end == next_.key_start
            for one, next_ in zip(group, group[1:])
        ]
    )


def _padded(anchors: Tensor, keys: Tensor | None, at: Intervals, group: list[Region]) -> Batch:
    """Regions of several lengths. Padding repeats the last row of a region and has no pair."""
    found = []
    for start, end in ((0, 1), (2, 3)):
        starts, ends = (torch.tensor([region[side] for region in group])[:, None] for side in (start, end))
        place = torch.arange(int((ends - starts).max())) + starts
        found.append((torch.minimum(place, ends - 1), place < ends))
    (rows, real), (columns, real_keys) = found
    outside = ~(real[:, :, None] & real_keys[:, None])
    return Batch(anchors, keys, at, rows, columns, len(group), outside=outside, real=real)


def _everything(anchors: Tensor, keys: Tensor | None, at: Intervals) -> Batch:
    """All rows as one region. Pairs of different regions, and rows that are no anchors, are outside."""
    num_keys = (anchors if keys is None else keys).shape[0]
    region, column = at.region(), torch.arange(num_keys, device=anchors.device)
    inside = (column >= at.key_start[region, None]) & (column < at.key_end[region, None]) & at.is_anchor()[:, None]
    return Batch(anchors, keys, at, slice(0, anchors.shape[0]), slice(0, num_keys), 1, outside=~inside[None])


class Batch:
    """Anchors [R, n, D] of some regions, their keys [R, m, D], and which of their pairs count.

    outside [R, n, m]: pairs of no region. real [R, n]: rows that are no padding.
    """

    def __init__(
        self,
        anchors: Tensor,
        keys: Tensor | None,
        at: Intervals,
        rows: Where,
        columns: Where,
        number: int,
        outside: Tensor | None = None,
        real: Tensor | None = None,
    ):
        self.rows, self.columns, self.number, self.outside, self.real = rows, columns, number, outside, real
        self.at, self.is_self = at, keys is None
        others = anchors if keys is None else keys
        both = keys is None and isinstance(rows, slice) and rows == columns
        self.all_rows = number == 1 and rows == slice(0, anchors.shape[0])
        self.all_columns = number == 1 and columns == slice(0, others.shape[0])
        self.anchors = self.take(anchors)
        self.keys = self.anchors if both else self.take_keys(others)
        self.lowest = torch.finfo(anchors.dtype).min / 8  # below every logit, also when it is added twice
        self._inside: Tensor | None = None

    # ---- rows of a batch

    def take(self, values: Tensor) -> Tensor:
        """The anchors' values, of [N, ...]; as [R, n, ...]."""
        return values[None] if self.all_rows else self._take(values, self.rows)

    def take_keys(self, values: Tensor) -> Tensor:
        """The keys' values, of [M, ...]; as [R, m, ...]."""
        return values[None] if self.all_columns else self._take(values, self.columns)

    def _take(self, values: Tensor, where: Where) -> Tensor:
        return values[where].unflatten(0, (self.number, -1)) if isinstance(where, slice) else values[where]

    def put(self, values: Tensor, into: Tensor) -> None:
        """Write the anchors' values [R, n] or [R, n, 1] to [N]."""
        if isinstance(self.rows, slice):
            into[self.rows] = values.flatten()
        else:
            into[self.rows[self.real]] = values.reshape(self.rows.shape)[self.real]

    def put_keys(self, values: Tensor, into: Tensor) -> None:
        """Write the keys' values [R, m, 1] to [M]."""
        if isinstance(self.columns, slice):
            into[self.columns] = values.flatten()
        else:
            # Padding repeats the last key of a region with zero: the larger value is that of the key itself.
            into.scatter_reduce_(0, self.columns.flatten(), values.flatten(), "amax")

    # ---- pairs

    def similarities(self, factor: Tensor) -> Tensor:
        """The similarities times a factor [R, n, m], 0 for a pair of no region, which could be NaN."""
        found = torch.bmm(self.anchors * factor, self.keys.mT)
        return found if self.outside is None else found.masked_fill_(self.outside, 0.0)

    def place(self, keys: Tensor) -> Tensor:
        """Key rows [N] as places among the keys of the anchor's region [R, n]."""
        rows = self.take(keys)
        if isinstance(self.columns, Tensor):
            return rows - self.columns[:, :1]
        if self.number > 1:
            starts = torch.arange(self.columns.start, self.columns.stop, self.keys.shape[1])
            return rows - starts[:, None]
        return rows - self.columns.start if self.columns.start else rows

    def inside(self) -> Tensor:
        """1 if the key is in the anchor's interval of positives and is not the anchor itself, otherwise 0."""
        if self._inside is None:
            count = self.keys.shape[1]
            number = torch.arange(1, count + 1, dtype=self.anchors.dtype, device=self.anchors.device)
            start, end = self.place(self.at.pos_start)[..., None], self.place(self.at.pos_end)[..., None]
            # Inside both factors are at least 1. Outside exactly one of them is at most 0.
            self._inside = torch.sub(number, start).mul_(end + 1 - number).clamp_(0, 1)
            if self.outside is not None:
                self._inside.masked_fill_(self.outside, 0.0)
            self._set_self(self._inside, 0.0)
        return self._inside

    def exclude(self, values: Tensor, rule: str) -> Tensor:
        """Lower the pairs that the rule does not count to less than half of `lowest`; in place."""
        if self.outside is not None:
            values.masked_fill_(self.outside, self.lowest)
        if rule == "negatives":
            values.add_(self.inside(), alpha=self.lowest)
        elif rule == "positives":
            values.add_(1 - self.inside(), alpha=self.lowest)
        if rule != "every":
            self._set_self(values, self.lowest)
        return values

    def _set_self(self, values: Tensor, value: float) -> None:
        """Overwrite the pair of each anchor with itself."""
        if self.is_self and isinstance(self.rows, slice) and isinstance(self.columns, slice):
            if self.number == 1 or self.rows == self.columns:
                offset = self.rows.start - self.columns.start
                values.diagonal(offset, 1, 2).fill_(value)
                return
        own = self.place(self.at.self_pos)
        there = (own >= 0) & (own < values.shape[2]) & (self.take(self.at.self_pos) >= 0)
        if self.real is not None:
            there &= self.real
        if own.device.type == "cpu" and not bool(there.any()):
            return
        own = torch.where(there, own, 0).long()[..., None]
        values.scatter_(2, own, torch.where(there[..., None], value, values.gather(2, own)))

    # ---- gradients

    def add_gradients(self, slope: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None) -> None:
        """Add slope @ keys to the anchors' gradient and its transpose @ anchors to that of the keys."""
        if self.is_self and self.keys is self.anchors and isinstance(self.rows, slice):
            if d_anchors is not None:
                # A copy first, because a sum with slope.mT is slower.
                both = slope.mT.contiguous().add_(slope)
                torch.bmm(both, self.keys, out=self.take(d_anchors))
            return
        if d_anchors is not None:
            self._add(torch.bmm(slope, self.keys), self.rows, d_anchors)
        if d_keys is not None:
            self._add(torch.bmm(slope.mT, self.anchors), self.columns, d_keys)

    def _add(self, gradient: Tensor, where: Where, into: Tensor) -> None:
        if isinstance(where, slice):
            into[where] += gradient.flatten(0, 1)
        else:
            into.index_add_(0, where.flatten(), gradient.flatten(0, 1))


class Softmax(NamedTuple):
    """exp2 of logits over the keys: `terms` relative to the largest of each row, their `total`, and that `shift`."""

    terms: Tensor
    total: Tensor
    shift: Tensor

    def lse(self) -> Tensor:
        """The logarithm to base 2 of the sum [R, n, 1], -inf for an empty set."""
        return self.shift + self.total.log2()

    def shares(self, factor: Tensor | float = 1.0) -> Tensor:
        """The terms divided by their sum, times a factor [R, n, 1]; in place. 0 for an empty set."""
        return self.terms.mul_(factor / self.total.clamp(min=1))  # the largest term is 1


def shift_of(logits: Tensor, lowest: float) -> Tensor:
    """The largest logit of each anchor [R, n, 1]. If all are excluded, a far larger number."""
    return logits.amax(2, keepdim=True).clamp_(min=lowest / 2)


def softmax_terms(logits: Tensor, lowest: float) -> Softmax:
    """Overwrite logits to base 2 with the terms of their softmax."""
    shift = shift_of(logits, lowest)
    terms = logits.sub_(shift).exp2_()
    return Softmax(terms, terms.sum(2, keepdim=True), shift)
