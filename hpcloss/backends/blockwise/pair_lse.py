"""`pair_lse` and `pair_lse_both` over tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import INF, LOG2E, accumulation, gradients_of_logits
from hpcloss.backends.blockwise.tiles import Tile, Tiles, is_safe_for
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
    factors: Sequence[float] = (1.0,),
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set or a row without anchor.

    Several positive factors of the scale, without a bias: one such lse for each [K, N].
    """
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if bias is None and is_safe_for(anchors, keys, _largest(scale_bound, factors)):
        total = anchors.new_zeros(len(factors), anchors.shape[0])
        tiles = Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            for number, scaled in _multiples(tiles, tile, logits, factors):
                terms = scaled.exp2_()
                total[number, tile.i0 : tile.i1] += terms.sum(1)
                if tile.mirrored:
                    total[number, tile.j0 : tile.j1] += terms.sum(0)
        lse = total.log_()
    else:
        lse = anchors.new_full((len(factors), anchors.shape[0]), -INF)
        tiles = Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            for number, scaled in _multiples(tiles, tile, logits, factors):
                toward = scaled if bias is None else scaled + bias[columns]
                lse[number, rows] = torch.logaddexp(lse[number, rows], torch.logsumexp(toward, 1))
                if tile.mirrored:
                    toward = scaled if bias is None else scaled + bias[rows, None]
                    lse[number, columns] = torch.logaddexp(lse[number, columns], torch.logsumexp(toward, 0))
    lse.masked_fill_(~at.is_anchor(), -INF)
    return lse[0] if len(factors) == 1 else lse


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
    factors: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale exp(scale s_ij + bias_j - lse_i), as d anchors, d keys (one sum in self-contrast), d scale.

    With several factors the result is their sum.
    """
    at = Intervals(*intervals)
    anchors, keys = accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    lse, grad = lse.view(len(factors), -1), grad.to(anchors.dtype).view(len(factors), -1)
    empty = lse == -INF
    grad = torch.where(empty, 0.0, grad)
    if tuple(factors) != (1.0,):
        grad = torch.stack([factor * one for factor, one in zip(factors, grad)])
    if bias is None and is_safe_for(anchors, keys, _largest(scale_bound, factors), twice=True):
        # One exponential serves both directions: exp(l - lse_i) = exp(l) exp(-lse_i).
        weights = grad * torch.exp(-torch.where(empty, 0.0, lse))
        tiles = Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            tiles.scatter(tile, _safe_slope(tiles, tile, logits, weights, factors), d_anchors, d_keys)
    else:
        lse = torch.where(empty, INF, lse)  # exp(. - inf) = 0
        tiles = Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.scatter(tile, _slope(tiles, tile, logits, lse, bias, grad, factors), d_anchors, d_keys)
    return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)


def _largest(scale_bound: float | None, factors: Sequence[float]) -> float | None:
    return None if scale_bound is None else scale_bound * max(factors)


def _multiples(tiles: Tiles, tile: Tile, logits: Tensor, factors: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
    """The logits times each factor, to be overwritten. The last one reuses their memory."""
    for number, factor in enumerate(factors[:-1]):
        yield number, torch.mul(logits, factor, out=tiles.buffer("multiple", tile))
    yield len(factors) - 1, logits if factors[-1] == 1 else logits.mul_(factors[-1])


def _safe_slope(tiles: Tiles, tile: Tile, logits: Tensor, weights: Tensor, factors: Sequence[float]) -> Tensor:
    """sum_k exp2(factor_k logit_ij) (w_ki + w_kj), with the second term only if the columns are anchors too."""
    rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    slope: Tensor | None = None
    for number, scaled in _multiples(tiles, tile, logits, factors):
        weight = weights[number, rows, None]
        if tile.mirrored or tile.diagonal:
            weight = torch.add(weight, weights[number, columns], out=tiles.buffer("weights", tile))
        scaled.exp2_()
        if len(factors) == 1:
            slope = scaled.mul_(weight)
        elif slope is None:
            slope = torch.mul(scaled, weight, out=tiles.buffer("slope", tile))
        else:
            slope.addcmul_(scaled, weight)
    return tiles.exclude(tile, logits if slope is None else slope, 0.0)


def _slope(
    tiles: Tiles,
    tile: Tile,
    logits: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """sum_k g_ki exp(factor_k logit_ij + bias_j - lse_ki), and the same of the other direction as in `_safe_slope`."""
    rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    tiles.exclude(tile, logits, -INF)
    slope: Tensor | None = None
    for number, scaled in _multiples(tiles, tile, logits, factors):
        toward = scaled - lse[number, rows, None]
        if bias is not None:
            toward += bias[columns]
        toward.exp_().mul_(grad[number, rows, None])
        if tile.mirrored or tile.diagonal:
            back = scaled.sub_(lse[number, columns])
            if bias is not None:
                back += bias[rows, None]
            toward.addcmul_(back.exp_(), grad[number, columns])
        slope = toward if slope is None else slope.add_(toward)
    return logits if slope is None else slope


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
