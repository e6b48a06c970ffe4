"""`pair_mean` of whole regions: weighted means over the positives."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.arithmetic import softplus
from hpcloss.backends.arithmetic import INF, LOG2E, accumulation, gradients
from hpcloss.backends.blockwise.linear_mean import at_most_one, linear_mean_backward, mean_of_one
from hpcloss.backends.dense.batches import Batch, batches
from hpcloss.backends.dense.forms import mean
from hpcloss.backends.dense.weights import Weights, weights
from hpcloss.plan.partition import Intervals


def pair_mean(
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """out_i = sum_{j in positives(i)} w_ij t_ij, w = softmax over the positives of (-hardness s_ij + log_weight_j).

    Without `stat` t = scale s (term "logit"), with it t = softplus(stat_i - (scale - discount) s) - discount s ("own").
    Also returns the weights' lse ("mass", -inf for an empty set) and slope_i = d out_i / d stat_i, all [N].
    """
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if stat is None and log_weight is None and not hardness and at.pos_start.device.type == "cpu":
        mass = at.counts()[0].to(anchors.dtype).log_()
        if at_most_one(mass):
            own = mean_of_one(anchors, anchors if others is None else others, mass, at)
            return own.mul_(scale), mass, torch.zeros_like(mass)
    one = torch.ones_like(scale)
    out, slope = (anchors.new_zeros(anchors.shape[0]) for _ in range(2))
    mass = torch.full_like(out, -INF)
    for batch in batches(anchors, others, at):
        similarity = batch.similarities(one)
        of_positives = _weights(batch, similarity, hardness, log_weight)
        terms, share = _terms(batch, similarity, stat, scale, discount)
        shares = of_positives.shares
        batch.put(mean(shares, terms), out)
        batch.put(of_positives.mass(), mass)
        if share is not None:
            batch.put(mean(shares, share), slope)
    return out, mass, slope


def pair_mean_backward(
    grad: Tensor,
    out: Tensor,
    mass: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    detach_weights: bool,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i w_ij (dt/ds - hardness (t_ij - out_i), the second part unless weights are detached)."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    grad = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    if stat is None and log_weight is None and not hardness and at_most_one(mass):
        linear = linear_mean_backward(grad * scale, anchors, others, mass, at, needs_anchors, needs_keys)
        if linear is not None:
            d_scale = anchors.new_zeros(())
            if needs_scale:
                d_scale = torch.dot(grad, mean_of_one(anchors, anchors if others is None else others, mass, at))
            return gradients(anchors, *linear, d_scale)
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if others is None else torch.zeros_like(others) if needs_keys else None
    d_scale, one = anchors.new_zeros(()), torch.ones_like(scale)
    for batch in batches(anchors, others, at):
        similarity = batch.similarities(one)
        shares = _weights(batch, similarity, hardness, log_weight).shares
        terms, share = _terms(batch, similarity, stat, scale, discount)
        by_scale = similarity if share is None else -share * similarity
        slope = scale.expand_as(terms) if share is None else share * (discount - scale) - discount
        if hardness and not detach_weights:
            slope = slope - hardness * (terms - batch.take(out)[..., None])
        shares.mul_(batch.take(grad)[..., None])
        if needs_scale:
            d_scale += torch.linalg.vecdot(shares, by_scale).sum()
        batch.add_gradients(shares.mul_(slope), d_anchors, d_keys)
    return gradients(anchors, d_anchors, None if others is None else d_keys, d_scale)


def _weights(batch: Batch, similarity: Tensor, hardness: float, log_weight: Tensor | None) -> Weights:
    of_logits = None
    if hardness:
        of_logits = torch.full((), -hardness * LOG2E, dtype=similarity.dtype, device=similarity.device)
    return weights(batch, similarity, of_logits, log_weight)


def _terms(
    batch: Batch, similarity: Tensor, stat: Tensor | None, scale: Tensor, discount: float
) -> tuple[Tensor, Tensor | None]:
    """t of each pair, and dt/dstat for the term "own"."""
    if stat is None:
        return similarity * scale, None
    against = torch.sub(batch.take(stat.to(scale.dtype))[..., None], similarity * (scale - discount))
    terms = softplus(against)
    if discount:
        terms.sub_(similarity, alpha=discount)
    return terms, against.sigmoid_()
