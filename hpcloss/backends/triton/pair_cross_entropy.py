"""`pair_cross_entropy`: the forward kernel, the slope of one pair for the backward pass, and the launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import launch
from hpcloss.backends.triton.backward import gradients_of_pairs, largest_of, lift_of, room_for_statistics
from hpcloss.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    Coefficients,
    Intervals,
    block_of,
    has_positives,
    hull_of,
    in_region,
    is_clean,
    load_rows,
    number_of_positives,
    others_met,
    regions_met,
    row_intervals,
    rows_count,
    rows_count_read,
    similarities,
    spans_of,
)


class Results(NamedTuple):
    """Results of the forward pass for each anchor, [N] each."""

    loss: Any
    lse: Any
    mass: Any  # the weights' lse
    shift: Any  # the largest similarity
    total: Any  # sum of the exponentials relative to it


class Statistics(NamedTuple):
    """Statistics of each anchor. `slope` uses the first two, `subtract_positives` the others."""

    shift: Any  # the largest similarity; INF without one
    factor_of_all: Any  # incoming gradient times scale, divided by the sum of the exponentials
    factor_of_positives: Any  # incoming gradient of the loss times scale; for uniform weights divided by their number
    mass: Any  # log2 of the sum of the weights; INF without positives


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, coefficients, results, intervals, num_rows, num_regions,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of BLOCK_I anchors over all keys but the anchor itself, and its distance to the positives' mean.

    Sums are relative to the row's largest similarity, which is subtracted before the scale: the difference of two close
    similarities is exact, and a fused multiply-add cannot round it differently in the backward pass. hardness None:
    uniform weights.
    """
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    positives = row_intervals(intervals, rows, there)
    sign, rate = sign_and_rate(tl.load(coefficients.scale))
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    powers = tl.zeros([BLOCK_I], tl.float32)
    heaviest = tl.full([BLOCK_I], -INF, tl.float32)
    weights = tl.zeros([BLOCK_I], tl.float32)
    gap = tl.zeros([BLOCK_I], tl.float32)
    low, high = regions_met(intervals, num_regions, first_row, BLOCK_I)
    for region in range(low, high):
        member, whole = in_region(intervals, region, first_row, rows, BLOCK_I)
        hull = hull_of(positives, member)
        begin, stop, _, _ = spans_of(hull, *others_met(intervals, region), "others")
        for first in range(begin, stop, BLOCK_J):
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < stop, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            signed = similarity * sign
            if not (is_clean(hull, first, first + BLOCK_J, "others") & whole & (first + BLOCK_J <= stop)):
                counted = rows_count(positives, columns, "others")
                signed = tl.where(counted & member[:, None] & (columns < stop)[None, :], signed, -INF)
            higher = tl.maximum(largest, tl.max(signed, 1))
            base = tl.where(higher == -INF, 0.0, higher)
            rise = tl.where(largest == -INF, 0.0, base - largest)
            largest = higher
            below = base[:, None] - signed
            powers = powers * tl.exp2(-rise * rate) + tl.sum(tl.exp2(-below * rate), 1)
            gap += weights * rise
            if has_positives(hull, first, first + BLOCK_J):
                positive = rows_count_read(intervals, rows, there, columns, "positives")
                positive = positive & member[:, None] & (columns < stop)[None, :]
                below = tl.where(positive, below, 0.0)
                if coefficients.hardness is None:
                    number = number_in_tile(positives, first, first + BLOCK_J, stop)
                    weights += tl.where(member, number, 0.0)
                    gap += tl.sum(below, 1)
                else:
                    heaviest, weights, gap = weighted(
                        similarity, positive, below, heaviest, weights, gap, coefficients.hardness
                    )
    store_results(results, rows, there, rate, largest, powers, heaviest, weights, gap)


@triton.jit
def number_in_tile(positives, first, last, stop):
    """Number of keys of a tile that are positives of each row, in a region that ends at `stop`."""
    start, end, self_key = positives
    nearest, farthest = tl.maximum(start, first), tl.minimum(tl.minimum(end, last), stop)
    return tl.maximum(number_of_positives(nearest, farthest, self_key), 0.0)


@triton.jit
def weighted(similarity, positive, below, heaviest, weights, gap, hardness):
    """The largest exponent of a row's weights, their sum, and the sum of weighted gaps, after a tile's positives."""
    hard = tl.where(positive, similarity * (-hardness * LOG2E), -INF)
    harder = tl.maximum(heaviest, tl.max(hard, 1))
    base = tl.where(harder == -INF, 0.0, harder)
    kept = tl.exp2(heaviest - base)
    weight = tl.exp2(hard - base[:, None])
    weights = weights * kept + tl.sum(weight, 1)
    gap = gap * kept + tl.sum(weight * below, 1)
    return harder, weights, gap


@triton.jit
def store_results(results, rows, there, rate, largest, powers, heaviest, weights, gap):
    """Write the `Results` of a block of rows."""
    base = tl.where(largest == -INF, 0.0, largest)
    log_powers = tl.log2(powers)
    filled = weights != 0  # true for NaN too, so the loss shows it
    mean_gap = gap / tl.where(filled, weights, 1.0)
    tl.store(results.loss + rows, tl.where(filled, log_powers + mean_gap * rate, 0.0) * LN2, mask=there)
    tl.store(results.lse + rows, (log_powers + base * rate) * LN2, mask=there)
    weight_base = tl.where(heaviest == -INF, 0.0, heaviest)
    tl.store(results.mass + rows, (tl.log2(weights) + weight_base) * LN2, mask=there)
    tl.store(results.shift + rows, base, mask=there)
    tl.store(results.total + rows, powers, mask=there)


def pair_cross_entropy(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_i = sum_{j in positives(i)} w_ij (lse_i - scale s_ij), w = softmax over the positives of (-hardness s_ij).

    Returns loss, lse, the weights' lse ("mass") and, for the backward pass, the largest similarity ("shift") and the
    sum relative to it, [N] each.
    """
    results = [torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device) for _ in range(5)]
    at = Intervals(*launch.int32(intervals))
    coefficients = Coefficients(None, launch.fp32(scale), hardness=hardness or None)
    tiling = launch.tiling("weighted_cross_entropy" if hardness else "pair_cross_entropy", anchors)
    launch.run(
        forward_kernel, tiling.programs, anchors,
        anchors, launch.as_anchors(anchors, keys), coefficients, Results(*results), at,
        anchors.shape[0], at.own_start.numel(), **tiling.constants,
    )  # fmt: skip
    return tuple(results)


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, grad_lse, mass, shift, total, intervals, coefficients, largest_grads, statistics, num_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The `Statistics` of each anchor [N, 4], and the lift of its slopes.

    Uniform weights are divided by the number of positives as p is by the total: if all positives are one point, these
    are equal, and p - w is 0 to the last bit.
    """
    _, rows, there = block_of(num_rows, BLOCK)
    mass_i = tl.load(mass + rows, mask=there, other=-INF)
    filled = mass_i != -INF
    powers = tl.load(total + rows, mask=there, other=0.0)
    of_positives = tl.load(grad + rows * grad_stride, mask=filled, other=0.0)
    of_all = of_positives
    if grad_lse is not None:
        of_all += tl.load(grad_lse + rows, mask=powers > 0, other=0.0)
    factor = tl.load(coefficients.scale)
    if coefficients.lift is not None:
        lifted = lift_of(largest_of(largest_grads, grad_stride, num_rows, BLOCK), tl.abs(factor))
        tl.store(coefficients.lift, lifted)
        factor *= lifted
    of_all, of_positives = of_all * factor, of_positives * factor
    if coefficients.hardness is None:
        start, end, self_key = row_intervals(intervals, rows, filled)
        of_positives /= tl.where(filled, number_of_positives(start, end, self_key), 1.0)
    here = statistics + rows.to(tl.int64) * 4  # places of the members of `Statistics`
    # With the sign of the scale, so `slope` need not apply it to each similarity. All of this is exact.
    sign, _ = sign_and_rate(tl.load(coefficients.scale))
    shift_i = tl.where(powers > 0, tl.load(shift + rows, mask=there, other=0.0), INF)
    tl.store(here, sign * shift_i, mask=there)
    tl.store(here + 1, of_all / tl.where(powers > 0, powers, 1.0), mask=there)
    tl.store(here + 2, of_positives, mask=there)
    tl.store(here + 3, tl.where(filled, mass_i * LOG2E, INF), mask=there)


@triton.jit
def sign_and_rate(scale):
    """The sign of the scale, and its absolute value for powers of 2."""
    return tl.where(scale < 0, -1.0, 1.0), tl.abs(scale) * LOG2E


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, coefficients, TERM: tl.constexpr, ONLINE: tl.constexpr
):  # fmt: skip
    """g scale p of each pair, both directions added: the part of all keys. The second result is not used.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is the anchor). None: a side has
    none. Arguments and results are those of `pair_mean`'s `slope`.
    """
    rate = scale * LOG2E
    slopes = tl.zeros_like(similarity)
    if own is not None:
        anchor = Statistics(*own)
        slopes += tl.exp2((similarity - anchor.shift[:, None]) * rate) * anchor.factor_of_all[:, None]
    if other is not None:
        anchor = Statistics(*other)
        slopes += tl.exp2((similarity - anchor.shift[None, :]) * rate) * anchor.factor_of_all[None, :]
    return slopes, slopes


@triton.jit
def subtract_positives(slopes, similarity, positive, own, other, coefficients):
    """The slopes of `slope` less g scale w of the positive pairs."""
    # Both directions are added in the order of `slope`, so equal terms cancel exactly.
    weights = tl.zeros_like(similarity)
    if own is not None:
        anchor = Statistics(*own)
        weight = weight_of(similarity, anchor.mass[:, None], coefficients.hardness)
        weights += weight * anchor.factor_of_positives[:, None]
    if other is not None:
        anchor = Statistics(*other)
        weight = weight_of(similarity, anchor.mass[None, :], coefficients.hardness)
        weights += weight * anchor.factor_of_positives[None, :]
    return slopes - tl.where(positive, weights, 0.0)


@triton.jit
def weight_of(similarity, mass, hardness):
    """Weight of a positive. The factor holds all of a uniform weight."""
    weight = 1.0
    if hardness is not None:
        weight = tl.exp2(similarity * (-hardness * LOG2E) - mass)
    return weight


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
    grad_lse = launch.fp32(grad_lse)
    statistics, lift, largest_grads, grad = room_for_statistics(grad, mass, anchors, grad_lse, total)
    coefficients = Coefficients(None, launch.fp32(scale), hardness=hardness or None, lift=lift)
    at = Intervals(*launch.int32(intervals[:3]), None, None)
    launch.row_by_row(
        statistics_kernel, mass,
        grad, grad.stride(0), grad_lse, mass, shift, total, at, coefficients,
        largest_grads, statistics, mass.numel(),
    )  # fmt: skip
    d_anchors, d_keys, d_scale = gradients_of_pairs(
        anchors, keys, statistics, coefficients, intervals,
        dict(SLOPE=slope, SUBTRACT=subtract_positives, TERM="cross_entropy", RULE="others", ONLINE=True),
        "weighted_cross_entropy_backward" if hardness else "cross_entropy_backward",
        needs_anchors or needs_scale, needs_keys, False,
    )  # fmt: skip
    if needs_scale:
        # Logits depend on the scale as on the anchors' length. In self-contrast d holds both sides of each pair.
        d_scale = (anchors * d_anchors).sum() / (coefficients.scale * (2 if keys is None else 1))
    return d_anchors if needs_anchors else d_anchors.new_empty(0), d_keys, d_scale
