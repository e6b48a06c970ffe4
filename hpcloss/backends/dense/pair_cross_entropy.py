"""`pair_cross_entropy` of whole regions: a log-sum-exp and the positives' mean from one S."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import INF, LN2, LOG2E, accumulation, gradients_of_logits
from hpcloss.backends.dense.batches import batches, shift_of
from hpcloss.backends.dense.forms import mean
from hpcloss.backends.dense.weights import weights
from hpcloss.plan.partition import Intervals


def pair_cross_entropy(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_i = sum_{j in positives(i)} w_ij (lse_i - scale s_ij), w = softmax over the positives of (-hardness s_ij).

    Returns loss, lse, the weights' lse ("mass"), shift and total, [N] each. The last two give backward
    p_ij = exp(scale s_ij - lse_i) = 2^(scale s_ij / ln 2 - shift_i) / total_i without the rounding of the lse.
    """
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    loss, shift, total = (anchors.new_zeros(anchors.shape[0]) for _ in range(3))
    mass = torch.full_like(loss, -INF)
    for batch in batches(anchors, others, at):
        logits = batch.similarities(scale * LOG2E)
        of_positives = weights(batch, logits, -hardness / scale if hardness else None)
        largest = shift_of(batch.exclude(logits, "others"), batch.lowest)
        above = logits.sub_(largest)
        gap = mean(of_positives.shares, above)
        summed = above.exp2_().sum(2, keepdim=True)
        found = torch.where(of_positives.there(), (summed.log2() - gap) * LN2, 0.0)
        for value, into in ((found, loss), (largest, shift), (summed, total), (of_positives.mass(), mass)):
            batch.put(value, into)
    shift = torch.where(total > 0, shift, 0.0)
    return loss, (shift + total.log2()) * LN2, mass, shift, total


def pair_cross_entropy_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    mass: Tensor,
    shift: Tensor,
    total: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale ((g_i + h_i) p_ij - g_i w_ij), for incoming gradients g of the loss and h of the lse."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    of_positives = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    of_all = of_positives if grad_lse is None else of_positives + grad_lse.to(anchors.dtype)
    of_all = torch.where(total > 0, of_all, 0.0) / torch.where(total > 0, total, 1.0)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if others is None else torch.zeros_like(others) if needs_keys else None
    for batch in batches(anchors, others, at):
        logits = batch.similarities(scale * LOG2E)
        shares = weights(batch, logits, -hardness / scale if hardness else None).shares
        terms = batch.exclude(logits, "others").sub_(batch.take(shift)[..., None]).exp2_()
        slope = terms.mul_(batch.take(of_all)[..., None]).sub_(shares.mul_(batch.take(of_positives)[..., None]))
        batch.add_gradients(slope, d_anchors, d_keys)
    return gradients_of_logits(anchors, others, scale, d_anchors, d_keys, needs_anchors, needs_scale)
