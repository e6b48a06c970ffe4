"""`pair_mean` over tiles, or without pairs if the sums of the positives are enough."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.arithmetic import softplus
from hpcloss.backends.arithmetic import INF, LOG2E, accumulation, finite_mass, gradients
from hpcloss.backends.blockwise.linear_mean import linear_mean, linear_mean_backward
from hpcloss.backends.blockwise.pair_lse import pair_lse
from hpcloss.backends.blockwise.tiles import Side, Tiles, is_safe_for, sides
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
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if stat is not None and log_weight is None:
        margin = 2 * abs(discount) + abs(hardness)
        if is_safe_for(anchors, keys, scale_bound, twice=True, margin=margin):
            return _own_mean(anchors, keys, stat, scale, hardness, discount, at)
    mass = weight_mass(anchors, keys, log_weight, hardness, at)
    out, slope = torch.zeros_like(mass), torch.zeros_like(mass)
    if stat is None and log_weight is None and hardness == 0:
        mean = linear_mean(anchors, keys, mass, at)
        if mean is not None:
            return scale * mean, mass, slope
    weights, whole = _Weights(mass, log_weight, hardness), torch.zeros_like(mass)
    weighted = hardness != 0 or log_weight is not None
    tiles = Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        for side in sides(tile, both=tile.mirrored):
            weight = weights(similarity, side)
            if weighted:
                whole[side.own] += tiles.exclude(tile, weight, 0.0).sum(side.dim)
            if stat is None:
                out[side.own] += tiles.exclude(tile, weight * similarity, 0.0).sum(side.dim) * scale
                continue
            logits = side.along(stat) - similarity * (scale - discount)
            terms = softplus(logits)
            if discount:
                terms -= discount * similarity
            out[side.own] += tiles.exclude(tile, terms.mul_(weight), 0.0).sum(side.dim)
            slope[side.own] += tiles.exclude(tile, logits.sigmoid_().mul_(weight), 0.0).sum(side.dim)
    if weighted:
        # The mass of large exponents is rounded, so the weights do not sum to exactly 1. Backward subtracts `out` from
        # the terms and needs the mean under the same weights.
        whole = torch.where(whole > 0, whole, 1.0)
        out, slope = out / whole, slope / whole
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
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    grad = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    d_scale = anchors.new_zeros(())
    differentiated = hardness != 0 and not detach_weights
    if stat is None and log_weight is None and hardness == 0:
        linear = linear_mean_backward(grad * scale, anchors, keys, mass, at, needs_anchors, needs_keys)
        if linear is not None:
            return gradients(anchors, *linear, (grad * out).sum() / scale if needs_scale else d_scale)
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    if stat is not None and log_weight is None and not differentiated and not needs_scale:
        margin = 2 * abs(discount) + abs(hardness)
        if is_safe_for(anchors, keys, scale_bound, twice=True, margin=margin):
            factor = grad * torch.exp(-finite_mass(mass))
            _own_mean_backward(factor, anchors, keys, stat, scale, hardness, discount, at, d_anchors, d_keys)
            return gradients(anchors, d_anchors, None if keys is None else d_keys, d_scale)
    weights = _Weights(mass, log_weight, hardness)
    tiles = Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        slopes = []
        for side in sides(tile, both=tile.mirrored or tile.diagonal):
            weight = weights(similarity, side) * side.along(grad)
            slope, by_scale = _slope(
                similarity, side, weight, out, stat, scale, hardness if differentiated else 0.0, discount, needs_scale
            )
            if by_scale is not None and (side.dim == 1 or tile.mirrored):
                d_scale += tiles.exclude(tile, by_scale, 0.0).sum()
            slopes.append(slope)
        # Constant slopes are broadcast. The rule is symmetric, so one mask serves both directions.
        total = torch.add(*slopes) if len(slopes) == 2 else slopes[0]
        total = tiles.exclude(tile, total.expand_as(similarity).contiguous(), 0.0)
        tiles.scatter(tile, total, d_anchors, d_keys)
    return gradients(anchors, d_anchors, None if keys is None else d_keys, d_scale)


def _slope(
    similarity: Tensor,
    side: Side,
    weight: Tensor,
    out: Tensor,
    stat: Tensor | None,
    scale: Tensor,
    hardness: float,
    discount: float,
    needs_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """g w (dt/ds - hardness (t - out)) and g w dt/dscale of the pairs of a tile; weight: g w. hardness 0: detached."""
    if stat is None:
        terms = similarity * scale if hardness else None
        by_scale, slope = weight * similarity if needs_scale else None, weight * scale
    else:
        logits = side.along(stat) - similarity * (scale - discount)
        terms = softplus(logits) if hardness else None
        if terms is not None and discount:
            terms -= discount * similarity
        share = logits.sigmoid_().mul_(weight)
        by_scale = share * -similarity if needs_scale else None
        slope = share.mul_(discount - scale)
        if discount:
            slope -= discount * weight
    if terms is not None:
        slope = slope + weight * terms.sub_(side.along(out)).mul_(-hardness)
    return slope, by_scale


def _own_mean(
    anchors: Tensor, keys: Tensor | None, stat: Tensor, scale: Tensor, hardness: float, discount: float, at: Intervals
) -> tuple[Tensor, Tensor, Tensor]:
    """The "own" term if nothing can overflow: one pass, and both directions of a tile share the exponentials.

    With y_ij = exp(stat_i) exp(-(scale - discount) s_ij): t_ij = log(1 + y_ij) - discount s_ij, dt/dstat = y / (1 + y).
    """
    out, slope, mass = (anchors.new_zeros(anchors.shape[0]) for _ in range(3))
    push = torch.exp(stat.to(anchors.dtype))
    tiles = Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        decay = torch.mul(similarity, (discount - scale) * LOG2E, out=tiles.buffer("decay", tile)).exp2_()
        weight = None
        if hardness:
            weight = torch.mul(similarity, -hardness * LOG2E, out=tiles.buffer("weight", tile)).exp2_()
            tiles.exclude(tile, weight, 0.0)
        for side in sides(tile, both=tile.mirrored):
            ratio = torch.mul(decay, side.along(push), out=tiles.buffer("ratio", tile))
            terms = torch.log1p(ratio, out=tiles.buffer("terms", tile))
            if discount:
                terms.sub_(similarity, alpha=discount)
            share = ratio.div_(torch.add(ratio, 1.0, out=tiles.buffer("denominator", tile)))
            for values, total in ((terms, out), (share, slope)):
                values = tiles.exclude(tile, values, 0.0) if weight is None else values.mul_(weight)
                total[side.own] += values.sum(side.dim)
            if weight is not None:
                mass[side.own] += weight.sum(side.dim)
    mass = mass.log_() if hardness else weight_mass(anchors, keys, None, 0.0, at)
    mass.masked_fill_(~at.is_anchor(), -INF)
    share_of_one = torch.exp(-finite_mass(mass))
    return out.mul_(share_of_one), mass, slope.mul_(share_of_one)


def _own_mean_backward(
    factor: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor,
    scale: Tensor,
    hardness: float,
    discount: float,
    at: Intervals,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
) -> None:
    """dS_ij = -factor_i weight_ij ((scale - discount) y_ij / (1 + y_ij) + discount), added to d_anchors and d_keys.

    factor_i: incoming gradient over the sum of the unnormalised weights.
    """
    push = torch.exp(stat.to(anchors.dtype))
    pull = factor * push * (discount - scale)
    one = anchors.new_ones(())
    tiles = Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        decay = torch.mul(similarity, (discount - scale) * LOG2E, out=tiles.buffer("decay", tile)).exp2_()
        slopes = []
        for side in sides(tile, both=tile.mirrored or tile.diagonal):
            # pull y / (push (1 + y)), with y / push = decay multiplied in once for both directions
            slope = torch.addcmul(one, decay, side.along(push), out=tiles.buffer(f"slope{side.dim}", tile))
            slopes.append(torch.div(side.along(pull), slope, out=slope))
        total = slopes[0].add_(slopes[1]) if len(slopes) == 2 else slopes[0]
        total.mul_(decay)
        if discount:
            for side in sides(tile, both=tile.mirrored or tile.diagonal):
                total.sub_(side.along(factor), alpha=discount)
        if hardness:
            total.mul_(similarity.mul_(-hardness * LOG2E).exp2_())
        tiles.scatter(tile, tiles.exclude(tile, total, 0.0), d_anchors, d_keys)


def weight_mass(
    anchors: Tensor, keys: Tensor | None, log_weight: Tensor | None, hardness: float, at: Intervals
) -> Tensor:
    """log sum over the positives of exp(-hardness s_ij + log_weight_j); the log of their number if both are 0."""
    if hardness == 0 and log_weight is None:
        return at.counts()[0].to(anchors.dtype).log()
    scale = torch.full((), -hardness, dtype=anchors.dtype, device=anchors.device)  # new_tensor would wait for a copy
    return pair_lse(anchors, keys, log_weight, scale, None, list(at), "positives")


class _Weights:
    """w_ij of a tile, normalised: exp(-hardness s_ij + log_weight_j - mass_i). Constant weights: one number per row."""

    def __init__(self, mass: Tensor, log_weight: Tensor | None, hardness: float):
        self.mass = finite_mass(mass)
        self.log_weight, self.hardness = log_weight, hardness

    def __call__(self, similarity: Tensor, side: Side) -> Tensor:
        exponent = -side.along(self.mass)
        if self.hardness != 0:
            exponent = exponent - self.hardness * similarity
        if self.log_weight is not None:
            exponent = exponent + side.across(self.log_weight)
        return exponent.exp()
