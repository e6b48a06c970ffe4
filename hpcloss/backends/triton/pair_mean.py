"""`pair_mean`: forward kernel, and what its backward pass says of one pair."""

from __future__ import annotations

import triton
import triton.language as tl

from hpcloss.backends.triton.tile import (
    INF,
    LN2,
    LOG2E,
    counts,
    hulls,
    is_clean,
    largest_of,
    lift_of,
    load_rows,
    meeting,
    number_of_positives,
    reciprocal,
    row_intervals,
    similarities,
    softplus,
    spans,
)


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, stat, log_weight, scale, hardness, discount, out, mass, slope_of_stat,
    pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start, key_end, num_rows, num_regions,
    D: tl.constexpr, TERM: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted mean of t_ij over the positives of BLOCK_I anchors, with the weights' lse and d mean / d stat.

    hardness None: uniform weights. ONLINE: weights with a running maximum, as attention accumulates its values.
    """
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    stat_i = tl.zeros([BLOCK_I], tl.float32)
    if TERM == "own":
        stat_i = tl.load(stat + rows, mask=there, other=0.0) * LOG2E
    logit_scale = tl.load(scale)
    own_scale = scale_of_own(logit_scale, discount) * LOG2E
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    weights = tl.zeros([BLOCK_I], tl.float32)
    terms = tl.zeros([BLOCK_I], tl.float32)
    shares = tl.zeros([BLOCK_I], tl.float32)
    low, high = meeting(anchor_start, anchor_end, num_regions, first_row, first_row + BLOCK_I)
    for region in range(low, high):
        first_anchor, last_anchor = tl.load(anchor_start + region), tl.load(anchor_end + region)
        member = (rows >= first_anchor) & (rows < last_anchor)
        whole = (first_row >= first_anchor) & (first_row + BLOCK_I <= last_anchor)
        outer_start, outer_end, inner_start, inner_end, own_start, own_end = hulls(start, end, own, member)
        begin, _, _, stop = spans(
            outer_start, outer_end, inner_start, inner_end,
            tl.load(key_start + region), tl.load(key_end + region), "positives",
        )  # fmt: skip
        if hardness is None:
            weights += tl.where(member, number_of_positives(start, end, own), 0.0)
        for first in range(begin, stop, BLOCK_J):
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < stop, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            if TERM == "own":
                term, share = softplus(stat_i[:, None] - similarity * own_scale)
                if discount is not None:
                    term -= (discount * LOG2E) * similarity
            else:
                term = logit_scale * similarity
                share = tl.zeros_like(term)
            if hardness is not None:
                exponent = similarity * (-hardness * LOG2E)
                if log_weight is not None:
                    exponent += tl.load(log_weight + columns, mask=columns < stop, other=0.0)[None, :] * LOG2E
            clean = is_clean(
                outer_start, outer_end, inner_start, inner_end, own_start, own_end, first, first + BLOCK_J, "positives"
            )
            if not (clean & whole & (first + BLOCK_J <= stop)):
                counted = counts(start[:, None], end[:, None], own[:, None], columns[None, :], "positives")
                counted = counted & member[:, None] & (columns < stop)[None, :]
                if hardness is None:
                    term, share = tl.where(counted, term, 0.0), tl.where(counted, share, 0.0)
                else:
                    exponent = tl.where(counted, exponent, -INF)
            if hardness is not None:
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
            if TERM == "own":
                shares += tl.sum(share, 1)
    if TERM == "own":
        terms *= LN2
    whole_weight = tl.where(weights > 0, weights, 1.0)
    tl.store(out + rows, terms / whole_weight, mask=there)
    tl.store(slope_of_stat + rows, shares / whole_weight, mask=there)
    base = tl.where(largest == -INF, 0.0, largest)
    tl.store(mass + rows, (tl.log2(weights) + base) * LN2, mask=there)


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, out, mass, stat, scale, hardness, pull, discount, largest_grads, lift, statistics, num_rows,
    TERM: tl.constexpr, ONLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per anchor (stat, factor, mass, out) as `slope` takes them.

    Weights that `slope` does not shift by their mass are divided by their sum here. Without ONLINE stat is its
    exponential; then the third is the factor of the exponential of s: what is left of the slope's numerator.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    mass_i = tl.load(mass + rows, mask=there, other=-INF)
    empty = mass_i == -INF
    third = tl.where(empty, INF, mass_i * LOG2E)
    factor = tl.where(empty, 0.0, tl.load(grad + rows * grad_stride, mask=there, other=0.0))
    if lift is not None:
        bound = tl.abs(tl.load(scale))
        if discount is not None:
            bound += 2 * tl.abs(discount)
        if pull is not None:
            bound *= 1 + 2 * tl.abs(pull)
        lifted = lift_of(largest_of(largest_grads, grad_stride, num_rows, BLOCK), bound)
        tl.store(lift, lifted)
        factor *= lifted
    if (hardness is None) or (not ONLINE):
        factor *= tl.exp2(-third)
    stat_i = tl.zeros([BLOCK], tl.float32)
    if TERM == "own":
        stat_i = tl.load(stat + rows, mask=there, other=0.0) * LOG2E
        if not ONLINE:
            stat_i = tl.exp2(stat_i)
            third = -scale_of_own(tl.load(scale), discount) * stat_i * factor
    here = statistics + rows.to(tl.int64) * 4
    tl.store(here, stat_i, mask=there)
    tl.store(here + 1, factor, mask=there)
    tl.store(here + 2, third, mask=there)
    tl.store(here + 3, tl.load(out + rows, mask=there, other=0.0), mask=there)


@triton.jit
def scale_of_own(scale, discount):
    """scale - discount: of the similarity inside "own"."""
    if discount is not None:
        scale -= discount
    return scale


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, hardness, pull, discount,
    TERM: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Of each pair d loss/ds = g w [dt/ds + pull (t - out)], both directions added, and the own one's d loss/dscale.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is), None where a side has none.
    """
    slopes = tl.zeros_like(similarity)
    along_scale = slopes
    if (TERM == "own") and (not ONLINE):
        slopes = bounded_slope(similarity, own, other, scale, hardness, discount)
    else:
        if own is not None:
            stat, factor, mass, out = own
            by_similarity, by_scale = directed(
                similarity, stat[:, None], out[:, None], scale, pull, discount, TERM
            )  # fmt: skip
            weight = factor[:, None] * weight_of(similarity, other_bias, mass[:, None], hardness, ONLINE)
            slopes += weight * by_similarity
            along_scale = weight * by_scale
        if other is not None:
            stat, factor, mass, out = other
            by_similarity, _ = directed(similarity, stat[None, :], out[None, :], scale, pull, discount, TERM)
            weight = factor[None, :] * weight_of(similarity, own_bias, mass[None, :], hardness, ONLINE)
            slopes += weight * by_similarity
    return slopes, along_scale


@triton.jit
def directed(similarity, stat, out, scale, pull, discount, TERM: tl.constexpr):
    """dt/ds + pull (t - out), and dt/dscale."""
    if TERM == "own":
        inner = scale_of_own(scale, discount)
        term, share = softplus(stat - similarity * (inner * LOG2E))
        term *= LN2
        by_similarity, by_scale = -inner * share, -share * similarity
        if discount is not None:
            by_similarity -= discount
            term -= discount * similarity
    else:
        term, by_scale = scale * similarity, similarity
        by_similarity = scale + tl.zeros_like(similarity)
    if pull is not None:
        by_similarity += pull * (term - out)
    return by_similarity, by_scale


@triton.jit
def weight_of(similarity, key_bias, mass, hardness, ONLINE: tl.constexpr):
    """Weight of a positive over what the statistics' factor holds of it: 1 where weights are uniform."""
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
def bounded_slope(similarity, own, other, scale, hardness, discount):
    """The slope of term "own" where nothing can overflow: three special functions for both directions of a pair.

    With e = exp(-(scale - discount) s), u_i = 1 + e exp(stat_i) and numerators a_i: e (a_i / u_i + a_j / u_j), of which
    the sum is (a_i u_j + a_j u_i) / (u_i u_j): one reciprocal.
    """
    decay = tl.exp2(similarity * (-scale_of_own(scale, discount) * LOG2E))
    if own is not None:
        push, factor, numerator, _ = own
        whole, part, always = 1.0 + decay * push[:, None], numerator[:, None], factor[:, None]
    if other is not None:
        push, factor, numerator, _ = other
        other_whole = 1.0 + decay * push[None, :]
        if own is not None:
            part = part * other_whole + numerator[None, :] * whole
            whole *= other_whole
            always = always + factor[None, :]
        else:
            whole, part, always = other_whole, numerator[None, :], factor[None, :]
    slopes = decay * (part * reciprocal(whole))
    if discount is not None:
        slopes -= discount * always
    if hardness is not None:
        slopes *= tl.exp2(similarity * (-hardness * LOG2E))
    return slopes
