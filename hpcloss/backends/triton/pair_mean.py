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
    lift_of,
    load_rows,
    meeting,
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
            inside = (own >= start) & (own < end)
            weights += tl.where(member, (end - start - tl.where(inside, 1, 0)).to(tl.float32), 0.0)
        for first in range(begin, stop, BLOCK_J):
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < stop, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            if TERM == "own":
                term, share = softplus(stat_i[:, None] - similarity * ((logit_scale - discount) * LOG2E))
                term -= discount * similarity
            else:
                term = logit_scale * similarity
                share = tl.zeros_like(term)
            clean = is_clean(
                outer_start, outer_end, inner_start, inner_end, own_start, own_end, first, first + BLOCK_J, "positives"
            )
            clean = clean & whole & (first + BLOCK_J <= stop)
            counted = counts(start[:, None], end[:, None], own[:, None], columns[None, :], "positives")
            counted = counted & member[:, None] & (columns < stop)[None, :]
            if hardness is None:
                if not clean:
                    term = tl.where(counted, term, 0.0)
                    share = tl.where(counted, share, 0.0)
                terms += tl.sum(term, 1)
                if TERM == "own":
                    shares += tl.sum(share, 1)
            else:
                exponent = similarity * (-hardness * LOG2E)
                if log_weight is not None:
                    exponent += tl.load(log_weight + columns, mask=columns < stop, other=0.0)[None, :] * LOG2E
                if not clean:
                    exponent = tl.where(counted, exponent, -INF)
                if ONLINE:
                    higher = tl.maximum(largest, tl.max(exponent, 1))
                    base = tl.where(higher == -INF, 0.0, higher)
                    kept = tl.exp2(largest - base)
                    largest = higher
                    weights, terms, shares = weights * kept, terms * kept, shares * kept
                    exponent -= base[:, None]
                weight = tl.exp2(exponent)
                weights += tl.sum(weight, 1)
                terms += tl.sum(weight * term, 1)
                if TERM == "own":
                    shares += tl.sum(weight * share, 1)
    whole_weight = tl.where(weights > 0, weights, 1.0)
    tl.store(out + rows, terms / whole_weight, mask=there)
    tl.store(slope_of_stat + rows, shares / whole_weight, mask=there)
    base = tl.where(largest == -INF, 0.0, largest)
    tl.store(mass + rows, (tl.log2(weights) + base) * LN2, mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def statistics_kernel(
    grad, out, mass, stat, scale, hardness, pull, discount, largest_grad, lift, statistics, num_rows,
    TERM: tl.constexpr, ONLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per anchor (stat, factor, mass, out) as `slope` takes them; without ONLINE, stat as its exponential.

    Weights that `slope` does not shift by their mass are divided by their sum here.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    mass_i = tl.load(mass + rows, mask=there, other=-INF)
    empty = mass_i == -INF
    mass_i = tl.where(empty, INF, mass_i * LOG2E)
    factor = tl.where(empty, 0.0, tl.load(grad + rows, mask=there, other=0.0))
    if lift is not None:
        bound = tl.abs(tl.load(scale)) + 2 * tl.abs(discount)
        if pull is not None:
            bound *= 1 + 2 * tl.abs(pull)
        lifted = lift_of(tl.load(largest_grad), bound)
        tl.store(lift, lifted)
        factor *= lifted
    if (hardness is None) or (not ONLINE):
        factor *= tl.exp2(-mass_i)
    stat_i = tl.zeros([BLOCK], tl.float32)
    if TERM == "own":
        stat_i = tl.load(stat + rows, mask=there, other=0.0) * LOG2E
        if not ONLINE:
            stat_i = tl.exp2(stat_i)
    here = statistics + rows * 4
    tl.store(here, stat_i, mask=there)
    tl.store(here + 1, factor, mask=there)
    tl.store(here + 2, mass_i, mask=there)
    tl.store(here + 3, tl.load(out + rows, mask=there, other=0.0), mask=there)


@triton.jit
def slope(
    similarity, stat, factor, mass, out, key_bias, scale, hardness, pull, discount,
    TERM: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """d/ds and d/dscale of the loss through one direction of a pair: g w [dt/ds + pull (t - out)], g w dt/dscale."""
    if TERM == "own":
        if ONLINE:
            term, share = softplus(stat - similarity * ((scale - discount) * LOG2E))
        else:
            # e^(stat - scale s) as a product, so that both directions of the pair share the exponential of s.
            ratio = tl.exp2(similarity * ((discount - scale) * LOG2E)) * stat
            term, share = ratio, ratio * reciprocal(1.0 + ratio)
        by_similarity = (discount - scale) * share - discount
        by_scale = -share * similarity
        term -= discount * similarity
    else:
        term = scale * similarity
        by_similarity = scale + tl.zeros_like(similarity)
        by_scale = similarity
    if pull is not None:
        by_similarity += pull * (term - out)
    weight = factor
    if hardness is not None:
        exponent = similarity * (-hardness * LOG2E)
        if key_bias is not None:
            exponent += key_bias * LOG2E
        if ONLINE:
            exponent -= mass
        weight = factor * tl.exp2(exponent)
    return weight * by_similarity, weight * by_scale
