"""`pair_lse` and `pair_lse_both`: the forward kernel, the slope of one pair for the backward pass, and the launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.bounds import is_safe
from hpcloss.backends.triton import launch
from hpcloss.backends.triton.backward import (
    Sides,
    gradient_of_side,
    gradients_of_pairs,
    largest_of,
    lift_of,
    room_for_statistics,
    sum_if_wanted,
)
from hpcloss.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    Coefficients,
    Intervals,
    block_of,
    hull_of,
    in_region,
    is_clean,
    load_rows,
    others_met,
    regions_met,
    row_intervals,
    rows_count,
    similarities,
    spans_of,
    tile_of,
)


class Statistics(NamedTuple):
    """Statistics of each anchor, for which `slope` is exp2(scale s + bias - shift) times a factor."""

    shift: Any  # log2 of the sum of exponentials; INF for an empty set
    factor: Any  # incoming gradient times scale; without ONLINE divided by the sum of exponentials, like the next
    scale_factor: Any  # incoming gradient, for d scale
    unused: Any


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, coefficients, lse, intervals, num_rows, num_regions,
    D: tl.constexpr, RULE: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) of BLOCK_I anchors; -inf for an empty sum.

    ONLINE: with a running maximum. Without it exp(scale s_ij) must stay finite.
    """
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    positives = row_intervals(intervals, rows, there)
    exponent_scale = tl.load(coefficients.scale) * LOG2E
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    low, high = regions_met(intervals, num_regions, first_row, BLOCK_I)
    for region in range(low, high):
        member, whole = in_region(intervals, region, first_row, rows, BLOCK_I)
        hull = hull_of(positives, member)
        spans = spans_of(hull, *others_met(intervals, region), RULE)
        before = tl.cdiv(spans.hole - spans.begin, BLOCK_J)
        for tile in range(before + tl.cdiv(spans.stop - spans.rest, BLOCK_J)):
            first, last = tile_of(spans, tile, before, BLOCK_J)
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < last, D, BLOCK_D)
            exponent = similarities(x, y, PRECISION) * exponent_scale
            if coefficients.key_bias is not None:
                exponent += tl.load(coefficients.key_bias + columns, mask=columns < last, other=0.0)[None, :] * LOG2E
            if not (is_clean(hull, first, first + BLOCK_J, RULE) & whole & (first + BLOCK_J <= last)):
                counted = rows_count(positives, columns, RULE)
                exponent = tl.where(counted & member[:, None] & (columns < last)[None, :], exponent, -INF)
            if ONLINE:
                higher = tl.maximum(largest, tl.max(exponent, 1))
                base = tl.where(higher == -INF, 0.0, higher)
                total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(exponent - base[:, None]), 1)
                largest = higher
            else:
                total += tl.sum(tl.exp2(exponent), 1)
    if ONLINE:
        total_log = tl.log2(total) + tl.where(largest == -INF, 0.0, largest)
    else:
        total_log = tl.log2(total)
    tl.store(lse + rows, total_log * LN2, mask=there)


def pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set or a row without anchor."""
    others = launch.as_anchors(anchors, keys)
    online = bias is not None or not is_safe(others.shape[0], scale_bound, torch.float32)
    lse = torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device)
    at = Intervals(*launch.int32(intervals))
    tiling = launch.tiling("pair_lse", anchors)
    launch.run(
        forward_kernel, tiling.programs, anchors,
        anchors, others, Coefficients(launch.fp32(bias), launch.fp32(scale)), lse, at,
        lse.numel(), at.own_start.numel(), RULE=rule, ONLINE=online, **tiling.constants,
    )  # fmt: skip
    return lse


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, lse, scale, largest_grads, lift, statistics, num_rows, ONLINE: tl.constexpr, BLOCK: tl.constexpr
):
    """The `Statistics` of each anchor [N, 4], and the lift of its slopes."""
    _, rows, there = block_of(num_rows, BLOCK)
    lse_i = tl.load(lse + rows, mask=there, other=-INF)
    empty = lse_i == -INF
    grad_i = tl.where(empty, 0.0, tl.load(grad + rows * grad_stride, mask=there, other=0.0))
    if lift is not None:
        factor = lift_of(largest_of(largest_grads, grad_stride, num_rows, BLOCK), tl.abs(tl.load(scale)))
        tl.store(lift, factor)
        grad_i *= factor
    shift = tl.where(empty, INF, lse_i * LOG2E)
    if not ONLINE:
        grad_i *= tl.exp2(-shift)
    here = statistics + rows.to(tl.int64) * 4  # places of the members of `Statistics`
    tl.store(here, shift, mask=there)
    tl.store(here + 1, grad_i * tl.load(scale), mask=there)
    tl.store(here + 2, grad_i, mask=there)
    tl.store(here + 3, 0.0, mask=there)


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, coefficients, TERM: tl.constexpr, ONLINE: tl.constexpr
):  # fmt: skip
    """d loss/ds = g scale exp(scale s + bias - lse) of each pair, both directions added, and the own d loss/dscale.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is the anchor). None: a side has
    none. Arguments are those of `pair_mean`'s `slope`.
    """
    exponent = similarity * (scale * LOG2E)
    slopes = tl.zeros_like(similarity)
    by_scale = slopes
    if own is not None:
        anchor = Statistics(*own)
        weight = directed(exponent, other_bias, anchor.shift[:, None], ONLINE)
        slopes += weight * anchor.factor[:, None]
        by_scale = weight * (anchor.scale_factor[:, None] * similarity)
    if other is not None:
        anchor = Statistics(*other)
        slopes += directed(exponent, own_bias, anchor.shift[None, :], ONLINE) * anchor.factor[None, :]
    return slopes, by_scale


@triton.jit
def directed(exponent, key_bias, shift, ONLINE: tl.constexpr):
    """exp(scale s + bias - lse) in the direction of the statistics; without ONLINE their factor holds the lse."""
    if key_bias is not None:
        exponent += key_bias * LOG2E
    if ONLINE:
        exponent -= shift
    return tl.exp2(exponent)


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
    count = (anchors if keys is None else keys).shape[0]
    online = bias is not None or not is_safe(count, scale_bound, torch.float32, twice=True)
    statistics, coefficients = _statistics(grad, lse, anchors, bias, scale, online)
    return gradients_of_pairs(
        anchors, keys, statistics, coefficients, intervals, _constants(rule, online),
        "backward" if bias is None else "weighted_backward",
        needs_anchors, needs_keys, needs_scale,
    )  # fmt: skip


def pair_lse_both(
    anchors: Tensor, keys: Tensor, scale: Tensor, scale_bound: float | None, intervals: list[Tensor], rule: str
) -> tuple[Tensor, Tensor]:
    """lse over the keys of each anchor [N] and over the anchors of each key [M]; -inf for an empty set."""
    keys = launch.as_anchors(anchors, keys)
    rows = pair_lse(anchors, keys, None, scale, scale_bound, intervals, rule)
    return rows, pair_lse(keys, anchors, None, scale, scale_bound, _exchanged(keys, intervals, rule), rule)


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
    keys = launch.as_anchors(anchors, keys)
    count = max(anchors.shape[0], keys.shape[0])
    online = not is_safe(count, scale_bound, torch.float32, twice=True)
    # One lift for both sides, because their slopes are added.
    both = torch.cat([grad_rows, grad_columns]), torch.cat([rows, columns])
    statistics, coefficients = _statistics(*both, anchors, None, scale, online)
    of_anchors, of_keys = statistics.split([anchors.shape[0], keys.shape[0]])
    gradients, parts = [], []
    for own, other, of_own, of_other, pairs, wanted in (
        (anchors, keys, of_anchors, of_keys, intervals, needs_anchors),
        (keys, anchors, of_keys, of_anchors, _exchanged(keys, intervals, rule), needs_keys),
    ):
        parts.append(torch.zeros_like(of_own[:, 0]) if needs_scale else None)
        sides, at = (Sides(own, other), Sides(of_own, of_other)), Intervals(*launch.int32(pairs))
        given = at, coefficients, _constants(rule, online), "backward", wanted, parts[-1]
        gradients.append(gradient_of_side(*sides, *given))
    return *gradients, sum_if_wanted(torch.cat(parts) if needs_scale else None, anchors)


def _statistics(
    grad: Tensor, lse: Tensor, rows: Tensor, bias: Tensor | None, scale: Tensor, online: bool
) -> tuple[Tensor, Coefficients]:
    statistics, lift, largest_grads, grad = room_for_statistics(grad, lse, rows)
    coefficients = Coefficients(launch.fp32(bias), launch.fp32(scale), lift=lift)
    launch.row_by_row(
        statistics_kernel, lse,
        grad, grad.stride(0), lse, coefficients.scale, largest_grads, lift, statistics, lse.numel(), ONLINE=online,
    )  # fmt: skip
    return statistics, coefficients


def _constants(rule: str, online: bool) -> dict[str, Any]:
    return {"SLOPE": slope, "SUBTRACT": None, "TERM": "lse", "RULE": rule, "ONLINE": online}


def _exchanged(keys: Tensor, intervals: list[Tensor], rule: str) -> list[Tensor]:
    """The pairs with anchors and keys exchanged.

    Rule "every" has no positives; otherwise the pairs are their own inverse.
    """
    *positives, anchor_start, anchor_end, key_start, key_end = intervals
    if rule == "every":
        positives = [torch.zeros(keys.shape[0], dtype=torch.int32, device=keys.device)] * 3
    if key_start.numel() > 1:
        # Kernels search the regions of their own rows, so these must ascend. Regions of keys may come in any order.
        is_filled = key_start < key_end
        key_end, order = torch.sort(torch.where(is_filled, key_end, 0), stable=True)
        key_start, anchor_start, anchor_end = (
            bound[order] for bound in (torch.where(is_filled, key_start, 0), anchor_start, anchor_end)
        )
    return [*positives, key_start, key_end, anchor_start, anchor_end]
