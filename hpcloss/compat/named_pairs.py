"""Losses of pairs that a caller names by their indices, as miners do.

Few pairs are computed one by one. Many pairs take part in a product of whole matrices, each with its weight: one
product costs less than gathering the rows of each pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.arithmetic import softplus
from hpcloss.operators import differentiable_once, statistics_dtype
from hpcloss.plan.sorting import changes
from hpcloss.primitives.autograd import inputs, needs, of_inputs
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale

CHUNK = 1 << 20  # elements of a matrix that are in memory at once
LOG2E = 1 / math.log(2)
FEW = 64  # pairs are few if the matrix has more than this many times as many


class Sides(NamedTuple):
    """Anchors `[N, D]`, keys `[M, D]` (None: the anchors), and the scale of similarities."""

    rows: Rows
    keys: Rows | None
    scale: Scale

    def inputs(self) -> tuple[Tensor | None, ...]:
        """The first inputs of the autograd functions."""
        return inputs(self.rows, self.keys, self.scale)

    def shape(self) -> tuple[int, int]:
        """The shape of the matrix of all pairs."""
        return len(self.rows.data), len((self.keys or self.rows).data)


class Named(NamedTuple):
    """Pairs (anchors[k], keys[k]), K indices each."""

    anchors: Tensor
    keys: Tensor


def are_many(sides: Sides, *named: Named) -> bool:
    """Whether a matrix pays for the pairs. Its one-byte entries take at most 4 times the memory of the indices."""
    anchors, keys = sides.shape()
    return FEW * sum(len(pairs.keys) for pairs in named) > anchors * keys


# ---------------------------------------------------------------------------------------------------------- losses


def supcon(sides: Sides, positive: Named, negative: Named) -> Tensor:
    """lse of an anchor's pairs less the mean of its positives `[N]`; 0 without a positive.

    A pair that is named twice counts once. A pair that is named as both is a positive.
    """
    if not are_many(sides, positive, negative):
        return _supcon_of_few(sides, positive, negative)
    own = torch.zeros(sides.shape(), dtype=torch.bool, device=sides.rows.data.device)
    own.index_put_(positive, own.new_ones(()))
    absent = (~own).index_put_(negative, own.new_zeros(()))
    return _OfMatrix.apply(*sides.inputs(), absent, own, "supcon")


def ntxent(sides: Sides, positive: Named, negative: Named) -> Tensor:
    """log(1 + e^(lse of the anchor's negatives - logit)) of each positive `[P]`, in the given order."""
    if are_many(sides, negative):
        times, (own,) = _times(sides, negative), _logits(sides, positive)
        stat = _OfMatrix.apply(*sides.inputs(), times, times, "lse")
    else:
        own, others = _logits(sides, positive, negative)
        stat = _segment_lse(others, negative.anchors, sides.shape()[0])
    return softplus(stat[positive.anchors] - own)


def ntxent_sum(sides: Sides, positive: Named, negative: Named) -> Tensor:
    """The sum of `ntxent`, in which a pair counts as often as it is named."""
    if not are_many(sides, positive, negative):
        return ntxent(sides, positive, negative).sum()
    return _OfMatrix.apply(*sides.inputs(), _times(sides, negative), _times(sides, positive), "ntxent").sum()


def _times(sides: Sides, named: Named) -> Tensor:
    """How often each pair is named [N, M]."""
    counts = torch.zeros(sides.shape(), device=sides.rows.data.device, dtype=torch.float32)
    return counts.index_put_(named, counts.new_ones(()), accumulate=True)


# -------------------------------------------------------------------------------------------------- many: a matrix


class _OfMatrix(torch.autograd.Function):
    """Losses [N] of the anchors by a rule from the logits [N, M] and two matrices of the pairs.

    The logits of as many anchors as fit into CHUNK are in memory at once. If that is all anchors, the slopes are
    computed with them and kept. Otherwise backward computes both again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        grad_rows: Tensor,
        keys: Tensor | None,
        grad_keys: Tensor | None,
        scale: Tensor,
        first: Tensor,
        second: Tensor,
        rule: str,
    ) -> Tensor:
        ctx.rule, ctx.whole = rule, first.numel() <= CHUNK
        slopes, moments = ctx.whole and any(needs(ctx)), ctx.whole and needs(ctx)[2]
        pieces = list(_pieces(rows, keys, scale, first, second, rule, slopes, moments))
        kept = (pieces[0].slopes, pieces[0].moments) if ctx.whole else (first, second)
        ctx.save_for_backward(rows, keys, scale, *kept)
        return torch.cat([piece.losses for piece in pieces])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, scale, *kept = ctx.saved_tensors
        of_rows, of_keys, of_scale = needs(ctx)
        pieces: Iterable[Any] = [(slice(None), None, *kept)]
        if not ctx.whole:
            first, second = kept
            pieces = _pieces(rows, keys, scale, first, second, ctx.rule, True, of_scale)
        others = (rows if keys is None else keys).to(grad.dtype)
        d_rows = torch.zeros_like(rows, dtype=grad.dtype) if of_rows else None
        d_keys = d_rows if keys is None else torch.zeros_like(others) if of_keys else None
        d_scale = torch.zeros_like(scale) if of_scale else None
        with torch.autocast(rows.device.type, enabled=False):
            for part, _, slopes, moments in pieces:
                # The anchors' factors go to the smaller matrices [N, D].
                factors = (grad[part] * scale)[:, None]
                if d_rows is not None:
                    d_rows[part].add_(torch.mm(slopes, others).mul_(factors))
                if d_keys is not None:
                    d_keys.addmm_(slopes.T, rows[part].to(grad.dtype) * factors)
                if d_scale is not None:
                    d_scale += grad[part] @ moments
        return of_inputs(ctx, (d_rows, d_keys, d_scale))


class _Piece(NamedTuple):
    """Some anchors with their losses and, if needed, d loss / d logit of each pair and d loss / d scale."""

    part: slice
    losses: Tensor
    slopes: Tensor | None
    moments: Tensor | None


def _pieces(
    rows: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
    rule: str,
    slopes: bool,
    moments: bool,
) -> Iterator[_Piece]:
    """All anchors, as many at a time as fit into CHUNK."""
    dtype = statistics_dtype(rows.dtype)
    keys = (rows if keys is None else keys).to(dtype)
    size = max(CHUNK // len(keys), 1)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        with torch.autocast(rows.device.type, enabled=False):
            logits = torch.mm(rows[part].to(dtype), keys.T).mul_(scale)
            losses, slope, above = RULES[rule](logits, first[part], second[part], slopes, moments)
        moment = None if slope is None or above is None else above.mul_(slope).sum(1) / scale
        yield _Piece(part, losses, slope, moment)


def _supcon_rule(
    logits: Tensor, absent: Tensor, own: Tensor, slopes: bool, relative: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log Z - mean of the positives' logits. Z, the sum over all pairs, and the logits are relative to the largest.

    With p_k = u_k / Z a slope is p_k - 1 / P for each of P positives. Z - P is summed by itself, as the sum of u - 1
    over the positives and of u over the others. So if a single positive is the largest, the loss log(1 + (Z - P)) and
    its slopes are exact, however small they are.
    """
    logits.masked_fill_(absent, _lowest(logits))
    above = logits.sub_(_largest(logits))
    positives = own.to(logits.dtype)
    number = positives.sum(1)
    some, at_least_one = number > 0, number.clamp(min=1)
    mean = (above * positives).sum(1) / at_least_one
    kept = above.clone() if relative else None
    terms = _exp_(above).sub_(positives)
    rest = terms.sum(1)
    losses = torch.where(some, torch.log1p(rest + (at_least_one - 1)) - mean, 0.0)
    if not slopes:
        return losses, None, None
    # The slopes of a row have the sum 0, so the scale's gradient may take the relative logits.
    share = torch.where(some, 1 / (rest + at_least_one), 0.0)
    return losses, terms.mul_(share[:, None]).sub_(positives.mul_((share * rest / at_least_one)[:, None])), kept


def _ntxent_rule(
    logits: Tensor, negatives: Tensor, positives: Tensor, slopes: bool, relative: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of softplus(lse of the negatives - logit) over the positives.

    The matrices give how often each pair counts.
    """
    terms, total, top, stat = _of_negatives(logits, negatives)
    kept = logits - top if relative else None
    # The logit of a pair that is no positive becomes inf, so its term is 0 even if it was NaN.
    gap = torch.sub(stat, logits.masked_fill_(positives == 0, math.inf), out=logits)
    losses = softplus(gap).mul_(positives).sum(1)
    if not slopes:
        return losses, None, None
    pull = gap.sigmoid_().mul_(positives)
    push = torch.where(total > 0, pull.sum(1, keepdim=True) / total, 0.0)
    return losses, terms.mul_(push).sub_(pull), kept


def _lse_rule(
    logits: Tensor, negatives: Tensor, _: Tensor, slopes: bool, relative: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp of the negatives. The slopes of a row have the sum 1, so the logits stay absolute."""
    terms, total, _, stat = _of_negatives(logits, negatives)
    if not slopes:
        return stat[:, 0], None, None
    return stat[:, 0], terms.mul_(torch.where(total > 0, 1 / total, 0.0)), logits if relative else None


def _of_negatives(logits: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms [n, M] of the sum relative to the largest; the sum, the largest and the log-sum-exp of each row [n, 1]."""
    terms = torch.where(times > 0, logits, _lowest(logits))
    top = _largest(terms)
    terms = _exp_(terms.sub_(top)).mul_(times)
    total = terms.sum(1, keepdim=True)
    return terms, total, top, torch.where(total > 0, total.log() + top, -math.inf)


RULES: dict[str, Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]] = {
    "supcon": _supcon_rule,
    "ntxent": _ntxent_rule,
    "lse": _lse_rule,
}


def _exp_(x: Tensor) -> Tensor:
    """e^x in place, in constant time. torch.exp takes 12 to 36 times as long for results that underflow."""
    return x.mul_(LOG2E).exp2_()


def _lowest(logits: Tensor) -> float:
    """A number below every logit that stays finite when a logit is subtracted."""
    return torch.finfo(logits.dtype).min / 4


def _largest(logits: Tensor) -> Tensor:
    """The largest of each row [n, 1]; 0 if all are the lowest."""
    top = logits.amax(1, keepdim=True)
    return top.masked_fill_(top == _lowest(logits), 0.0)


# ---------------------------------------------------------------------------------------------- few: one by one


def _supcon_of_few(sides: Sides, positive: Named, negative: Named) -> Tensor:
    num_anchors, num_keys = sides.shape()
    anchors, keys = [torch.cat(both) for both in zip(positive, negative)]
    logits = torch.cat(_logits(sides, positive, negative))
    # The first of equal pairs counts. It is a positive if one of them is.
    pair, order = torch.sort(anchors * num_keys + keys, stable=True)
    first, anchors, logits = changes(pair), anchors[order], logits[order]
    # Relative to the largest logit of an anchor: the loss is then no difference of large numbers.
    logits = logits - _segment_max(logits, anchors, num_anchors)[anchors]
    lse = _segment_lse(torch.where(first, logits, -math.inf), anchors, num_anchors)
    positives = first & (order < len(positive.keys))
    zeros = torch.zeros_like(lse)
    number = zeros.index_add(0, anchors, positives.to(lse.dtype))
    mean = zeros.index_add(0, anchors, torch.where(positives, logits, 0.0)) / number.clamp(min=1)
    return torch.where(number > 0, lse - mean, 0.0)


def _logits(sides: Sides, *named: Named) -> list[Tensor]:
    """The logits of the pairs of each argument, computed together."""
    anchors, keys = [torch.cat(indices) for indices in zip(*named)]
    return list(_PairLogits.apply(*sides.inputs(), anchors, keys).split([len(pairs.keys) for pairs in named]))


def _segment_lse(logits: Tensor, segment: Tensor, count: int) -> Tensor:
    """Log-sum-exp of the logits [K] of each of `count` segments; -inf without gradient for an empty segment."""
    top = _segment_max(logits, segment, count)
    total = torch.zeros_like(top).index_add(0, segment, (logits - top[segment]).exp())
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + top, -math.inf)


def _segment_max(logits: Tensor, segment: Tensor, count: int) -> Tensor:
    """The largest of the logits [K] of each of `count` segments, without gradient; 0 if all are -inf."""
    top = logits.new_full((count,), -math.inf).scatter_reduce(0, segment, logits.detach(), "amax")
    return torch.where(top == -math.inf, 0.0, top)


class _PairLogits(torch.autograd.Function):
    """scale <row of anchors[k], row of keys[k]> [K], by pieces: K rows of each side would be D times the result."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        grad_rows: Tensor,
        keys: Tensor | None,
        grad_keys: Tensor | None,
        scale: Tensor,
        of: Tensor,
        with_: Tensor,
    ) -> Tensor:
        dtype = statistics_dtype(rows.dtype)
        size = max(CHUNK // max(rows.shape[1], 1), 1)
        others = rows if keys is None else keys
        parts = zip(of.split(size), with_.split(size))
        dots = torch.cat([(rows[a].to(dtype) * others[k].to(dtype)).sum(1) for a, k in parts])
        ctx.save_for_backward(rows, keys, scale, of, with_, dots if needs(ctx)[2] else None)
        return dots * scale

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, scale, of, with_, dots = ctx.saved_tensors
        of_rows, of_keys, of_scale = needs(ctx)
        d_rows = torch.zeros_like(rows, dtype=grad.dtype) if of_rows else None
        others = rows if keys is None else keys
        d_keys = d_rows if keys is None else torch.zeros_like(keys, dtype=grad.dtype) if of_keys else None
        size = max(CHUNK // max(rows.shape[1], 1), 1)
        for a, k, g in zip(of.split(size), with_.split(size), (grad * scale)[:, None].split(size)):
            if d_rows is not None:
                d_rows.index_add_(0, a, g * others[k].to(grad.dtype))
            if d_keys is not None:
                d_keys.index_add_(0, k, g * rows[a].to(grad.dtype))
        return of_inputs(ctx, (d_rows, d_keys, grad @ dots if of_scale else None))
