"""`pair_lse` and `pair_lse_both` over tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import INF, LOG2E, accumulation, gradients_of_logits
from hpcloss.backends.blockwise.tiles import Tiles, is_safe_for
from hpcloss.operators import statistics_dtype
from hpcloss.plan.partition import Intervals


def pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set and where no anchor is."""
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if bias is None and is_safe_for(anchors, keys, scale_bound):
        total = anchors.new_zeros(anchors.shape[0])
        tiles = Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            terms = tiles.exclude(tile, logits.exp2_(), 0.0)
            total[tile.i0 : tile.i1] += terms.sum(1)
            if tile.mirrored:
                total[tile.j0 : tile.j1] += terms.sum(0)
        lse = total.log_()
    else:
        lse = anchors.new_full(anchors.shape[:1], -INF)
        tiles = Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            toward = logits if bias is None else logits + bias[columns]
            lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(toward, 1))
            if tile.mirrored:
                toward = logits if bias is None else logits + bias[rows, None]
                lse[columns] = torch.logaddexp(lse[columns], torch.logsumexp(toward, 0))
    return lse.masked_fill_(~at.is_anchor(), -INF)


def pair_lse_backward(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale exp(scale s_ij + bias_j - lse_i), as d anchors, d keys (one sum in self-contrast), d scale."""
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    empty = lse == -INF
    grad = torch.where(empty, 0.0, grad.to(anchors.dtype))
    if bias is None and is_safe_for(anchors, keys, scale_bound, twice=True):
        # One exponential serves both directions: exp(l - lse_i) = exp(l) exp(-lse_i).
        factor = grad * torch.exp(-torch.where(empty, 0.0, lse))
        tiles = Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            factors = factor[rows, None]
            if tile.mirrored or tile.diagonal:
                factors = torch.add(factors, factor[columns], out=tiles.buffer("factors", tile))
            slope = tiles.exclude(tile, logits.exp2_().mul_(factors), 0.0)
            tiles.scatter(tile, slope, d_anchors, d_keys)
    else:
        lse = torch.where(empty, INF, lse)  # exp(. - inf) = 0
        tiles = Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            toward = logits - lse[rows, None]
            if bias is not None:
                toward += bias[columns]
            slope = toward.exp_().mul_(grad[rows, None])
            if tile.mirrored or tile.diagonal:
                back = logits.sub_(lse[columns])
                if bias is not None:
                    back += bias[rows, None]
                slope.addcmul_(back.exp_(), grad[columns])
            tiles.scatter(tile, slope, d_anchors, d_keys)
    return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)


def pair_lse_both(
    anchors: Tensor, keys: Tensor, scale: Tensor, scale_bound: float | None, intervals: list[Tensor], rule: str
) -> tuple[Tensor, Tensor]:
    """lse over the keys of each anchor [N] and over the anchors of each key [M], from one S; -inf for an empty set."""
    anchors = anchors.to(statistics_dtype(anchors.dtype))
    keys = keys.to(anchors.dtype)
    rows, columns = anchors.new_full(anchors.shape[:1], -INF), keys.new_full(keys.shape[:1], -INF)
    tiles = Tiles(anchors, keys, Intervals(*intervals), rule, scale.to(anchors.dtype))
    safe = all(is_safe_for(side, None, scale_bound) for side in (anchors, keys))
    if safe:
        rows.zero_()
        columns.zero_()
    for tile, logits in tiles:
        row, column = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        if safe:
            terms = tiles.exclude(tile, logits.exp_(), 0.0)
            rows[row] += terms.sum(1)
            columns[column] += terms.sum(0)
        else:
            tiles.exclude(tile, logits, -INF)
            rows[row] = torch.logaddexp(rows[row], torch.logsumexp(logits, 1))
            columns[column] = torch.logaddexp(columns[column], torch.logsumexp(logits, 0))
    return (rows.log_(), columns.log_()) if safe else (rows, columns)


def pair_lse_both_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale (g_i exp(scale s_ij - row_i) + h_j exp(scale s_ij - column_j)), as d anchors, d keys, d scale."""
    anchors = anchors.to(statistics_dtype(anchors.dtype))
    keys = keys.to(anchors.dtype)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = torch.zeros_like(keys) if needs_keys else None
    sides = [(grad_rows, rows), (grad_columns, columns)]
    grad_rows, grad_columns = (torch.where(lse == -INF, 0.0, grad.to(anchors.dtype)) for grad, lse in sides)
    rows, columns = (torch.where(lse == -INF, INF, lse) for _, lse in sides)
    tiles = Tiles(anchors, keys, Intervals(*intervals), rule, scale)
    for tile, logits in tiles:
        row, column = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        slope = torch.exp(logits - rows[row, None]).mul_(grad_rows[row, None])
        slope += torch.exp(logits - columns[column]).mul_(grad_columns[column])
        tiles.scatter(tile, tiles.exclude(tile, slope, 0.0), d_anchors, d_keys)
    return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)
