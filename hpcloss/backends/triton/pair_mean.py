"""`pair_mean`: the forward kernel, the slope of one pair for the backward pass, and the launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.bounds import is_safe
from hpcloss.backends.triton import launch
from hpcloss.backends.triton.backward import gradients_of_pairs, largest_of, lift_of, room_for_statistics
from hpcloss.backends.triton.linear_mean import linear_mean, linear_mean_backward
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
    number_of_positives,
    others_met,
    reciprocal,
    regions_met,
    row_intervals,
    rows_count,
    similarities,
    softplus,
    spans_of,
)


class Results(NamedTuple):
    """Results of the forward pass for each anchor, [N] each."""

    out: Any
    mass: Any  # the weights' lse
    slope: Any  # d out / d stat


class Statistics(NamedTuple):
    """Statistics of each anchor, for `slope`."""

    stat: Any  # in powers of 2; 0 for a term without it
    factor: Any  # incoming gradient, divided by the sum of the weights unless `slope` shifts them by their mass
    mass: Any  # log2 of the sum of the weights; INF without positives
    out: Any


class BoundedStatistics(NamedTuple):
    """Statistics of each anchor, for `bounded_slope`."""

    power: Any  # exp(stat)
    factor: Any
    numerator: Any  # numerator of the slope, without the exponential of the similarity
    out: Any


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, stat, coefficients, results, intervals, num_rows, num_regions,
    D: tl.constexpr, TERM: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted mean of t_ij over the positives of BLOCK_I anchors, with the weights' lse and d mean / d stat.

    hardness None: uniform weights. ONLINE: weights with a running maximum, as attention accumulates its values.
    """
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    positives = row_intervals(intervals, rows, there)
    stat_i = tl.zeros([BLOCK_I], tl.float32)
    if TERM == "own_denominator":
        stat_i = tl.load(stat + rows, mask=there, other=0.0) * LOG2E
    scale = tl.load(coefficients.scale)
    inner = inner_scale(scale, coefficients.discount) * LOG2E
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    weights = tl.zeros([BLOCK_I], tl.float32)
    terms = tl.zeros([BLOCK_I], tl.float32)
    shares = tl.zeros([BLOCK_I], tl.float32)
    low, high = regions_met(intervals, num_regions, first_row, BLOCK_I)
    for region in range(low, high):
        member, whole = in_region(intervals, region, first_row, rows, BLOCK_I)
        hull = hull_of(positives, member)
        begin, stop, _, _ = spans_of(hull, *others_met(intervals, region), "positives")
        if coefficients.hardness is None:
            weights += tl.where(member, number_of_positives(*positives), 0.0)
        for first in range(begin, stop, BLOCK_J):
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < stop, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            term, share = term_and_share(similarity, stat_i, scale, inner, coefficients.discount, TERM)
            exponent = exponent_of(similarity, columns, stop, coefficients)
            if not (is_clean(hull, first, first + BLOCK_J, "positives") & whole & (first + BLOCK_J <= stop)):
                counted = rows_count(positives, columns, "positives")
                counted = counted & member[:, None] & (columns < stop)[None, :]
                if coefficients.hardness is None:
                    term, share = tl.where(counted, term, 0.0), tl.where(counted, share, 0.0)
                else:
                    exponent = tl.where(counted, exponent, -INF)
            if coefficients.hardness is not None:
                if ONLINE:
                    higher = tl.maximum(largest, tl.max(exponent, 1))
                    base = tl.where(higher == -INF, 0.0, higher)
                    kept = tl.exp2(largest - base)
                    largest = higher
                    weights, terms, shares = weights * kept, terms * kept, shares * kept
                    exponent -= base[:, None]
                weight = tl.exp2(exponent)
                weights += tl.sum(weight, 1)
                term, share = term * weight, share * weight
            terms += tl.sum(term, 1)
            if TERM == "own_denominator":
                shares += tl.sum(share, 1)
    store_results(results, rows, there, largest, weights, terms, shares, TERM)


@triton.jit
def term_and_share(similarity, stat, scale, inner, discount, TERM: tl.constexpr):
    """t of each pair, for the term "own_denominator" in powers of 2, and dt / d stat."""
    if TERM == "own_denominator":
        term, share = softplus(stat[:, None] - similarity * inner)
        if discount is not None:
            term -= (discount * LOG2E) * similarity
    else:
        term = scale * similarity
        share = tl.zeros_like(term)
    return term, share


@triton.jit
def exponent_of(similarity, columns, stop, coefficients):
    """log2 of the weight of each pair; without meaning for uniform weights."""
    exponent = similarity
    if coefficients.hardness is not None:
        exponent = similarity * (-coefficients.hardness * LOG2E)
        if coefficients.key_bias is not None:
            exponent += tl.load(coefficients.key_bias + columns, mask=columns < stop, other=0.0)[None, :] * LOG2E
    return exponent


@triton.jit
def store_results(results, rows, there, largest, weights, terms, shares, TERM: tl.constexpr):
    """Write the `Results` of a block of rows from their sums."""
    if TERM == "own_denominator":
        terms *= LN2
    divisor = tl.where(weights > 0, weights, 1.0)
    tl.store(results.out + rows, terms / divisor, mask=there)
    tl.store(results.slope + rows, shares / divisor, mask=there)
    base = tl.where(largest == -INF, 0.0, largest)
    tl.store(results.mass + rows, (tl.log2(weights) + base) * LN2, mask=there)


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

    Also returns the weights' lse ("mass", -inf for an empty set) and slope_i = d out_i / d stat_i, all [N].
    """
    if _needs_no_pairs(keys, stat, log_weight, hardness):
        return linear_mean(anchors, scale, intervals)
    others = launch.as_anchors(anchors, keys)
    # A bound is given for unit rows only, where |hardness s| is at most |hardness|.
    unit_bound = None if scale_bound is None else abs(hardness)
    online = log_weight is not None or not is_safe(others.shape[0], unit_bound, torch.float32)
    out = torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device)
    results = Results(out, torch.empty_like(out), torch.empty_like(out))
    at = Intervals(*launch.int32(intervals))
    tiling = launch.tiling("pair_mean", anchors)
    launch.run(
        forward_kernel, tiling.programs, anchors,
        anchors, others, launch.fp32(stat), _coefficients(scale, log_weight, hardness, discount), results,
        at, out.numel(), at.own_start.numel(), TERM=_term(stat), ONLINE=online, **tiling.constants,
    )  # fmt: skip
    return tuple(results)


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, out, mass, stat, coefficients, largest_grads, statistics, num_rows,
    TERM: tl.constexpr, ONLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `Statistics` of each anchor [N, 4], or its `BoundedStatistics`, and the lift of its slopes."""
    _, rows, there = block_of(num_rows, BLOCK)
    mass_i = tl.load(mass + rows, mask=there, other=-INF)
    empty = mass_i == -INF
    mass_i = tl.where(empty, INF, mass_i * LOG2E)
    factor = tl.where(empty, 0.0, tl.load(grad + rows * grad_stride, mask=there, other=0.0))
    if coefficients.lift is not None:
        bound = tl.abs(tl.load(coefficients.scale))
        if coefficients.discount is not None:
            bound += 2 * tl.abs(coefficients.discount)
        if coefficients.pull is not None:
            bound *= 1 + 2 * tl.abs(coefficients.pull)
        lifted = lift_of(largest_of(largest_grads, grad_stride, num_rows, BLOCK), bound)
        tl.store(coefficients.lift, lifted)
        factor *= lifted
    if (coefficients.hardness is None) or (not ONLINE):
        factor *= tl.exp2(-mass_i)
    stat_i, mass_or_numerator = tl.zeros([BLOCK], tl.float32), mass_i
    if TERM == "own_denominator":
        stat_i = tl.load(stat + rows, mask=there, other=0.0) * LOG2E
        if not ONLINE:
            stat_i = tl.exp2(stat_i)
            mass_or_numerator = -inner_scale(tl.load(coefficients.scale), coefficients.discount) * stat_i * factor
    here = statistics + rows.to(tl.int64) * 4  # places of the members of `Statistics` or `BoundedStatistics`
    tl.store(here, stat_i, mask=there)
    tl.store(here + 1, factor, mask=there)
    tl.store(here + 2, mass_or_numerator, mask=there)
    tl.store(here + 3, tl.load(out + rows, mask=there, other=0.0), mask=there)


@triton.jit
def inner_scale(scale, discount):
    """scale - discount: the factor of a similarity in its own denominator."""
    if discount is not None:
        scale -= discount
    return scale


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, coefficients, TERM: tl.constexpr, ONLINE: tl.constexpr
):  # fmt: skip
    """d loss/ds = g w [dt/ds + pull (t - out)] of each pair, both directions added, and the own d loss/dscale.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is the anchor). None: a side has
    none.
    """
    slopes = tl.zeros_like(similarity)
    by_scale = slopes
    if (TERM == "own_denominator") and (not ONLINE):
        slopes = bounded_slope(similarity, own, other, scale, coefficients)
    else:
        if own is not None:
            anchor = Statistics(*own)
            of_term, of_scale = directed(
                similarity, anchor.stat[:, None], anchor.out[:, None], scale, coefficients, TERM
            )  # fmt: skip
            mass = anchor.mass[:, None]
            weight = anchor.factor[:, None] * weight_of(similarity, other_bias, mass, coefficients.hardness, ONLINE)
            slopes += weight * of_term
            by_scale = weight * of_scale
        if other is not None:
            anchor = Statistics(*other)
            of_term, _ = directed(similarity, anchor.stat[None, :], anchor.out[None, :], scale, coefficients, TERM)
            mass = anchor.mass[None, :]
            weight = anchor.factor[None, :] * weight_of(similarity, own_bias, mass, coefficients.hardness, ONLINE)
            slopes += weight * of_term
    return slopes, by_scale


@triton.jit
def directed(similarity, stat, out, scale, coefficients, TERM: tl.constexpr):
    """dt/ds + pull (t - out), and dt/dscale."""
    if TERM == "own_denominator":
        inner = inner_scale(scale, coefficients.discount)
        term, share = softplus(stat - similarity * (inner * LOG2E))
        term *= LN2
        by_similarity, by_scale = -inner * share, -share * similarity
        if coefficients.discount is not None:
            by_similarity -= coefficients.discount
            term -= coefficients.discount * similarity
    else:
        term, by_scale = scale * similarity, similarity
        by_similarity = scale + tl.zeros_like(similarity)
    if coefficients.pull is not None:
        by_similarity += coefficients.pull * (term - out)
    return by_similarity, by_scale


@triton.jit
def weight_of(similarity, key_bias, mass, hardness, ONLINE: tl.constexpr):
    """The part of a positive's weight that the statistics' factor does not hold: 1 for uniform weights."""
    weight = 1.0
    if hardness is not None:
        exponent = similarity * (-hardness * LOG2E)
        if key_bias is not None:
            exponent += key_bias * LOG2E
        if ONLINE:
            exponent -= mass
        weight = tl.exp2(exponent)
    return weight


@triton.jit
def bounded_slope(similarity, own, other, scale, coefficients):
    """The slope for own denominators that cannot overflow: three special functions for both directions.

    With e = exp(-(scale - discount) s), u_i = 1 + e exp(stat_i) and numerators a_i the slope is e (a_i / u_i + a_j /
    u_j). The sum is (a_i u_j + a_j u_i) / (u_i u_j), with one reciprocal.
    """
    decay = tl.exp2(similarity * (-inner_scale(scale, coefficients.discount) * LOG2E))
    if own is not None:
        anchor = BoundedStatistics(*own)
        whole, part = 1.0 + decay * anchor.power[:, None], anchor.numerator[:, None]
        always = anchor.factor[:, None]
    if other is not None:
        anchor = BoundedStatistics(*other)
        other_whole = 1.0 + decay * anchor.power[None, :]
        if own is not None:
            part = part * other_whole + anchor.numerator[None, :] * whole
            whole *= other_whole
            always = always + anchor.factor[None, :]
        else:
            whole, part, always = other_whole, anchor.numerator[None, :], anchor.factor[None, :]
    slopes = decay * (part * reciprocal(whole))
    if coefficients.discount is not None:
        slopes -= coefficients.discount * always
    if coefficients.hardness is not None:
        slopes *= tl.exp2(similarity * (-coefficients.hardness * LOG2E))
    return slopes


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
    if _needs_no_pairs(keys, stat, log_weight, hardness):
        return linear_mean_backward(grad, out, mass, anchors, scale, intervals, needs_anchors, needs_scale)
    count = (anchors if keys is None else keys).shape[0]
    pull = None if detach_weights or hardness == 0 else -hardness
    # Two factors 1 + exp(stat_i - (scale - discount) s) with one reciprocal, and a weight.
    bound = None if scale_bound is None else 2 * (scale_bound + abs(discount)) + abs(hardness)
    safe = is_safe(count, bound, torch.float32, twice=True, margin=math.log(max(count, 1)))
    online = log_weight is not None or pull is not None or needs_scale or not safe
    statistics, lift, largest_grads, grad = room_for_statistics(grad, mass, anchors)
    coefficients = _coefficients(scale, log_weight, hardness, discount, pull, lift)
    launch.row_by_row(
        statistics_kernel, out,
        grad, grad.stride(0), out, mass, launch.fp32(stat), coefficients, largest_grads, statistics,
        out.numel(), TERM=_term(stat), ONLINE=online,
    )  # fmt: skip
    return gradients_of_pairs(
        anchors, keys, statistics, coefficients, intervals,
        dict(SLOPE=slope, SUBTRACT=None, TERM=_term(stat), RULE="positives", ONLINE=online),
        "weighted_backward" if online else "backward",
        needs_anchors, needs_keys, needs_scale,
    )  # fmt: skip


def _needs_no_pairs(keys: Tensor | None, stat: Tensor | None, log_weight: Tensor | None, hardness: float) -> bool:
    """Whether the term is linear with uniform weights in self-contrast, so that class sums give the mean."""
    return keys is None and stat is None and log_weight is None and hardness == 0


def _term(stat: Tensor | None) -> str:
    return "logit" if stat is None else "own_denominator"


def _coefficients(
    scale: Tensor,
    log_weight: Tensor | None,
    hardness: float,
    discount: float,
    pull: float | None = None,
    lift: Tensor | None = None,
) -> Coefficients:
    # Uniform weights need no exponential.
    is_uniform = hardness == 0 and log_weight is None
    weighting = None if is_uniform else hardness
    return Coefficients(launch.fp32(log_weight), launch.fp32(scale), weighting, pull, discount or None, lift)
