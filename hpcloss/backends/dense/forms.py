"""The forms of a contrast over one batch: the loss of each anchor, and its slope by every similarity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.arithmetic import softplus
from hpcloss.backends.arithmetic import LN2
from hpcloss.backends.dense.batches import Batch, Softmax, shift_of, softmax_terms
from hpcloss.backends.dense.weights import Weights, weights


class Options(NamedTuple):
    """The form of a contrast, as in `hpcloss.primitives.contrast`."""

    denominator: str
    hardness: float
    discount: float
    detach_weights: bool
    multiplicity: int


class Found(NamedTuple):
    """loss, counted [R, n, 1]; slope [R, n, m]: d loss / d logit.

    direct [R, n, m]: the part of d loss / d similarity that does not flow through the logits, over the scale; or
    None.
    """

    loss: Tensor
    counted: Tensor
    slope: Tensor
    direct: Tensor | None = None


def mean(shares: Tensor, values: Tensor) -> Tensor:
    """The weighted mean over the keys [R, n, 1]."""
    return torch.linalg.vecdot(shares, values)[..., None]


def _weights(batch: Batch, logits: Tensor, scale: Tensor, options: Options) -> Weights:
    return weights(batch, logits, -options.hardness / scale if options.hardness else None)


def _of_weights(shares: Tensor, terms: Tensor, scale: Tensor, options: Options) -> Tensor | None:
    """The part of a slope that flows through the weights of the mean of `terms`; None if they are constants."""
    if not options.hardness or options.detach_weights:
        return None
    from_mean = terms - mean(shares, terms)
    from_mean.sub_(mean(shares, from_mean))  # removes the rounding of a mean of large terms
    return from_mean.mul_(shares).mul_(-options.hardness / scale)


def _against_all(batch: Batch, logits: Tensor, scale: Tensor, options: Options) -> Found:
    of_positives = _weights(batch, logits, scale, options)
    shares = of_positives.shares
    direct = _of_weights(shares, logits * -LN2, scale, options)
    # Relative to the largest logit, so that near the minimum nothing is a difference of large numbers.
    shift = shift_of(batch.exclude(logits, "others"), batch.lowest)
    above = logits.sub_(shift)
    gap = mean(shares, above)
    terms = above.exp2_()
    softmax = Softmax(terms, terms.sum(2, keepdim=True), shift)
    counted, log_total = of_positives.there(), softmax.total.log2()
    if options.multiplicity > 1:
        log_total += math.log2(options.multiplicity)
    loss = torch.where(counted, (log_total - gap) * LN2, 0.0)
    return Found(loss, counted, softmax.shares(counted).sub_(shares), direct)


def _against_negatives(batch: Batch, logits: Tensor, scale: Tensor, options: Options) -> Found:
    of_positives = _weights(batch, logits, scale, options)
    shares = of_positives.shares
    direct, of_positives_mean = _of_weights(shares, logits * -LN2, scale, options), mean(shares, logits)
    softmax = softmax_terms(batch.exclude(logits, "negatives"), batch.lowest)
    counted = of_positives.there() & (softmax.total != 0)
    lse = softmax.lse()
    if options.multiplicity > 1:
        lse += math.log2(options.multiplicity)
    loss = torch.where(counted, (lse - of_positives_mean) * LN2, 0.0)
    slope = softmax.shares(counted).sub_(shares.mul_(counted))
    return Found(loss, counted, slope, None if direct is None else direct.mul_(counted))


def _own(batch: Batch, logits: Tensor, scale: Tensor, options: Options) -> Found:
    of_positives = _weights(batch, logits, scale, options)
    shares = of_positives.shares
    softmax = softmax_terms(batch.exclude(logits.clone(), "negatives"), batch.lowest)
    counted = of_positives.there() & (softmax.total != 0)
    lse = softmax.lse()
    if options.multiplicity > 1:
        lse += math.log2(options.multiplicity)
    damped = options.discount / scale
    against = torch.sub(lse, logits * (1 - damped) if options.discount else logits).mul_(LN2)
    terms = softplus(against)
    if options.discount:
        terms.sub_(logits * (damped * LN2))
        shares.mul_(counted)
    loss = torch.where(counted, mean(shares, terms), 0.0)
    direct = _of_weights(shares, terms, scale, options)
    share = against.sigmoid_()  # share of the negatives in the denominator of each positive
    slope = softmax.shares(mean(shares, share)).sub_(share.mul_(shares))
    if options.discount:
        discounted = (share - shares).mul_(damped)
        direct = discounted if direct is None else direct.add_(discounted)
    return Found(loss, counted, slope, direct)


def _pair(batch: Batch, logits: Tensor, scale: Tensor, options: Options) -> Found:
    place = batch.place(batch.at.pos_start)
    there = (place >= 0) & (place < logits.shape[2]) & (batch.take(batch.at.pos_end) > batch.take(batch.at.pos_start))
    place, there = torch.where(there, place, 0).long()[..., None], there[..., None]
    own = logits.gather(2, place)
    if batch.outside is not None:
        there = there & ~batch.outside.gather(2, place)
    logits.scatter_(2, place, torch.where(there, batch.lowest, own))
    softmax = softmax_terms(batch.exclude(logits, "others"), batch.lowest)
    against = (softmax.lse() - own).mul_(LN2)
    loss = torch.where(there, softplus(against), 0.0)
    share = torch.where(there, against.sigmoid_(), 0.0)
    return Found(loss, there, softmax.shares(share).scatter_add_(2, place, -share))


FORMS: dict[str, Callable[[Batch, Tensor, Tensor, Options], Found]] = {
    "all": _against_all,
    "negatives": _against_negatives,
    "own": _own,
    "pair": _pair,
}
