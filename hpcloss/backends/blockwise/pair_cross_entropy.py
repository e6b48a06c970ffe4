"""`pair_cross_entropy` over tiles: a log-sum-exp and the positives' mean from one S.

Tiles with a positive are summed relative to the largest logit of each row, which keeps the loss and its slopes exact
near the minimum. All other tiles are plain sums if nothing can overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import INF, LN2, LOG2E, accumulation, finite_mass, gradients_of_logits
from hpcloss.backends.blockwise.pair_mean import weight_mass
from hpcloss.backends.blockwise.tiles import Side, Tile, Tiles, is_safe_for, sides
from hpcloss.plan.partition import Intervals

LOWEST = torch.finfo(torch.float32).min / 4  # below every logit, and finite when a logit is subtracted


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
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    mass = weight_mass(anchors, keys, None, hardness, at)
    positives = _Positives(at, mass, hardness, scale)
    largest = anchors.new_full(anchors.shape[:1], LOWEST)
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
            # As in attention: the sums so far are scaled down when a larger logit comes.
            largest_i, total_i, gap_i, met_i = (values[side.own] for values in (largest, total, gap, met))
            now = torch.maximum(largest_i, logits.amax(side.dim))
            rise = now - largest_i
            # The last direction overwrites the logits, because memory outside the core's cache is slow.
            into = logits if side is directions[-1] else tiles.buffer("above", tile)
            above = torch.sub(logits, side.lay(now), out=into)
            gap_i.addcmul_(met_i, rise)
            if tile.positives != "none":
                gap_i -= positives.sum(tiles, tile, above, weight, side)
                met_i += positives.among(tile, side) if weight is None else weight.sum(side.dim)
            total_i.mul_(torch.exp2(-rise)).add_(above.exp2_().sum(side.dim))
            largest_i.copy_(now)
    shift = torch.where(largest == LOWEST, 0.0, largest)
    if safe:
        total += far * torch.exp2(-shift)
    total.masked_fill_(~at.is_anchor(), 0.0)
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
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    positives = _Positives(at, mass, hardness, scale)
    of_positives = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    of_all = of_positives if grad_lse is None else of_positives + grad_lse.to(anchors.dtype)
    of_all = torch.where(total > 0, of_all, 0.0) / torch.where(total > 0, total, 1.0)
    if hardness == 0:
        # Divided by the count, not by exp of its logarithm: if all positives are one point, p - w is exactly 0.
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
            for side in reversed(sides(tile, both=tile.mirrored)):
                into = logits if side.dim == 1 else tiles.buffer("slope", tile)  # the rows' direction comes last
                slopes.append(positives.slope(tiles, tile, logits, side, into, shift, of_all, of_positives))
            slope = tiles.exclude(tile, slopes[-1].add_(slopes[0]) if tile.mirrored else slopes[0], 0.0)
            if tile.diagonal:
                # Not from its columns: the row statistics come from s_ij, and s_ji may be rounded differently.
                slope = tiles.buffer("both", tile).copy_(slope.T).add_(slope)  # a sum with slope.T is slower
        tiles.scatter(tile, slope, d_anchors, d_keys)
    return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)


class _Positives:
    """The positives of a tile and their weights exp(-hardness s_ij - mass_i). Uniform weights are only counted."""

    def __init__(self, at: Intervals, mass: Tensor, hardness: float, scale: Tensor):
        self.at, self.hardness = at, hardness
        self.mass = finite_mass(mass) * LOG2E
        self.hardness_of_logits = -hardness / scale

    def weights(self, tiles: Tiles, tile: Tile, logits: Tensor, side: Side) -> Tensor | None:
        """Weights of the tile's pairs, 0 for pairs that are no positives. None if all positives weigh alike."""
        if self.hardness == 0 or tile.positives == "none":
            return None
        weight = torch.mul(logits, self.hardness_of_logits, out=tiles.buffer(f"weight{side.dim}", tile))
        return tiles.exclude(tile, weight.sub_(side.along(self.mass)).exp2_(), 0.0, "positives")

    def sum(self, tiles: Tiles, tile: Tile, values: Tensor, weight: Tensor | None, side: Side) -> Tensor:
        """Weighted sum of the positives' values, for each of the own anchors; values of excluded pairs are -inf."""
        if weight is None and self.are_all(tile):
            return values.sum(side.dim)
        kept = tiles.buffer("kept", tile).copy_(values)
        tiles.exclude(tile, kept, 0.0, "positives")
        return (kept if weight is None else kept.mul_(weight)).sum(side.dim)

    def are_all(self, tile: Tile) -> bool:
        """Whether every pair of the tile is a positive."""
        return tile.positives == "all" and not tile.diagonal and not tile.has_self

    def among(self, tile: Tile, side: Side) -> Tensor | int:
        """Number of positives in the tile, for each of the own anchors."""
        if self.are_all(tile):
            return side.other.stop - side.other.start
        start = self.at.pos_start[side.own].clamp(min=side.other.start)
        end = self.at.pos_end[side.own].clamp(max=side.other.stop)
        own = self.at.self_pos[side.own]
        return (end - start - ((own >= start) & (own < end)).to(end.dtype)).clamp(min=0)

    def slope(
        self,
        tiles: Tiles,
        tile: Tile,
        logits: Tensor,
        side: Side,
        into: Tensor,
        shift: Tensor,
        of_all: Tensor,
        of_positives: Tensor,
    ) -> Tensor:
        """of_all_i 2^(logit - shift_i) - of_positives_i w_ij, written to `into`, which may be the logits.

        Pairs that the rule excludes are overwritten later.
        """
        weight = self.weights(tiles, tile, logits, side)
        slope = torch.sub(logits, side.along(shift), out=into).exp2_().mul_(side.along(of_all))
        if tile.positives == "none":
            return slope
        if weight is not None:
            return slope.sub_(weight.mul_(side.along(of_positives)))
        if tile.positives == "all":
            return slope.sub_(side.along(of_positives))
        uniform = tiles.buffer("uniform", tile).copy_(side.along(of_positives).expand_as(slope))
        return slope.sub_(tiles.exclude(tile, uniform, 0.0, "positives"))
