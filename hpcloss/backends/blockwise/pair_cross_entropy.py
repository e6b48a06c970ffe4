"""`pair_cross_entropy` over tiles: a log-sum-exp and the positives' mean from one S.

Tiles that hold a positive are summed relative to the largest logit of each row, which keeps the loss and its slopes
exact near the minimum. All other tiles are plain sums where nothing can overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.backends.blockwise.pair_mean import weight_mass
from hpcloss.backends.blockwise.tiles import (
    INF,
    LOG2E,
    Side,
    Tile,
    Tiles,
    accumulation,
    finite_mass,
    gradients,
    is_safe_for,
    sides,
)
from hpcloss.partition import Pairs

LN2 = math.log(2)


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
    at = Pairs.from_intervals(intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    mass = weight_mass(anchors, keys, None, hardness, at)
    positives = _Positives(at, mass, hardness, scale)
    largest = anchors.new_full(anchors.shape[:1], -INF)
    total, far, gap, met = (anchors.new_zeros(anchors.shape[0]) for _ in range(4))
    safe = is_safe_for(anchors, keys, scale_bound, twice=True)
    tiles = Tiles(anchors, keys, at, "others", scale * LOG2E, by_class=True)
    for tile, logits in tiles:
        directions = sides(tile, both=tile.mirrored)
        if safe and tile.positives == "none":
            terms = tiles.exclude(tile, logits.exp2_(), 0.0)
            for side in directions:
                far[side.own] += terms.sum(side.dim)
            continue
        weights = [positives.weights(tiles, tile, logits, side) for side in directions]
        tiles.exclude(tile, logits, -INF)
        for side, weight in zip(directions, weights):
            # As attention accumulates its values: what was summed so far moves down when a larger logit comes.
            before = largest[side.own]
            now = torch.maximum(before, logits.amax(side.dim))
            base = torch.where(now == -INF, 0.0, now)
            rise = torch.where(before == -INF, 0.0, base - before)
            below = torch.sub(side.lay(base), logits, out=tiles.buffer("below", tile))
            terms = torch.neg(below, out=tiles.buffer("terms", tile)).exp2_()
            total[side.own] = total[side.own] * torch.exp2(-rise) + terms.sum(side.dim)
            gap[side.own] += met[side.own] * rise
            largest[side.own] = now
            if tile.positives != "none":
                below = positives.only(tiles, tile, below)  # an excluded pair lies infinitely far below
                gap[side.own] += (below if weight is None else below.mul_(weight)).sum(side.dim)
                met[side.own] += positives.among(side) if weight is None else weight.sum(side.dim)
    shift = torch.where(largest == -INF, 0.0, largest)
    total = (total + far * torch.exp2(-shift)).masked_fill_(~at.is_anchor(), 0.0)
    log_total = total.log2()
    loss = torch.where(mass == -INF, 0.0, (log_total + gap / torch.where(met > 0, met, 1.0)) * LN2)
    return loss, (shift + log_total) * LN2, mass, shift, total


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
    at = Pairs.from_intervals(intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    positives = _Positives(at, mass, hardness, scale)
    of_positives = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    of_all = of_positives if grad_lse is None else of_positives + grad_lse.to(anchors.dtype)
    of_all = torch.where(total > 0, of_all, 0.0) / torch.where(total > 0, total, 1.0)
    if hardness == 0:
        # By the count itself, not its logarithm: where all positives are one point p - w is 0 to the last bit.
        of_positives = of_positives / at.counts()[0].clamp(min=1)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    safe = is_safe_for(anchors, keys, scale_bound, twice=True)
    of_far = of_all * torch.exp2(-shift) if safe else of_all
    tiles = Tiles(anchors, keys, at, "others", scale * LOG2E, by_class=True)
    for tile, logits in tiles:
        if safe and tile.positives == "none":
            factors = of_far[tile.i0 : tile.i1, None]
            if tile.mirrored or tile.diagonal:
                factors = torch.add(factors, of_far[tile.j0 : tile.j1], out=tiles.buffer("factors", tile))
            slope = tiles.exclude(tile, logits.exp2_().mul_(factors), 0.0)
        else:
            slopes = []
            for side in sides(tile, both=tile.mirrored):
                slope = torch.sub(logits, side.along(shift), out=tiles.buffer(f"slope{side.dim}", tile))
                slope.exp2_().mul_(side.along(of_all))
                slopes.append(positives.subtract(tiles, tile, slope, logits, side, of_positives))
            slope = tiles.exclude(tile, slopes[0].add_(slopes[1]) if tile.mirrored else slopes[0], 0.0)
            if tile.diagonal:
                # Not from its columns: s_ji may be rounded unlike s_ij, from which the row statistics are.
                slope = torch.add(slope, slope.T, out=tiles.buffer("both", tile))
        tiles.scatter(tile, slope, d_anchors, d_keys)
    d_scale = anchors.new_zeros(())
    if d_anchors is not None:
        if needs_scale:
            # S depends on the scale as on the anchors' length; in self-contrast d holds both sides of each pair.
            d_scale = (anchors * d_anchors).sum() / (2 if keys is None else 1)
        d_anchors *= scale
    if keys is not None and d_keys is not None:
        d_keys *= scale
    return gradients(anchors, d_anchors if needs_anchors else None, None if keys is None else d_keys, d_scale)


class _Positives:
    """The positives of a tile and their weights exp(-hardness s_ij - mass_i); uniform weights are counts alone."""

    def __init__(self, at: Pairs, mass: Tensor, hardness: float, scale: Tensor):
        self.at, self.hardness = at, hardness
        self.mass = finite_mass(mass) * LOG2E
        self.hardness_of_logits = -hardness / scale

    def weights(self, tiles: Tiles, tile: Tile, logits: Tensor, side: Side) -> Tensor | None:
        """Weights of the tile's pairs, 0 where no positive is; None if all positives weigh alike."""
        if self.hardness == 0 or tile.positives == "none":
            return None
        weight = torch.mul(logits, self.hardness_of_logits, out=tiles.buffer(f"weight{side.dim}", tile))
        return self.only(tiles, tile, weight.sub_(side.along(self.mass)).exp2_())

    def only(self, tiles: Tiles, tile: Tile, values: Tensor) -> Tensor:
        """Overwrite with 0 what is no positive."""
        if tile.positives == "all":
            return tiles.exclude(tile, values, 0.0)
        return values.masked_fill_(~tiles.positives(tile), 0.0)

    def among(self, side: Side) -> Tensor:
        """How many of the tile's pairs are positives, for each of the own anchors."""
        start = self.at.pos_start[side.own].clamp(min=side.other.start)
        end = self.at.pos_end[side.own].clamp(max=side.other.stop)
        own = self.at.self_pos[side.own]
        return (end - start - ((own >= start) & (own < end)).to(end.dtype)).clamp(min=0)

    def subtract(self, tiles: Tiles, tile: Tile, slope: Tensor, logits: Tensor, side: Side, factor: Tensor) -> Tensor:
        """slope less factor_i w_ij of the positives; what the rule excludes is overwritten later."""
        if tile.positives == "none":
            return slope
        weight = self.weights(tiles, tile, logits, side)
        if weight is not None:
            return slope.addcmul_(weight, side.along(factor), value=-1)
        if tile.positives == "all":
            return slope.sub_(side.along(factor))
        return slope.sub_(torch.where(tiles.positives(tile), side.along(factor), 0.0))
