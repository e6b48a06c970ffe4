"""`pair_cross_entropy`: forward kernel, and what its backward pass says of one pair."""

from __future__ import annotations

import triton
import triton.language as tl

from hpcloss.backends.triton.tile import (
    INF,
    LN2,
    LOG2E,
    counts,
    counts_read,
    hulls,
    is_clean,
    largest_of,
    lift_of,
    load_rows,
    meeting,
    number_of_positives,
    row_intervals,
    similarities,
    spans,
)


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, scale, hardness, loss, lse, mass, shift, total,
    pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start, key_end, num_rows, num_regions,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_I anchors the log-sum-exp over all keys but the own one, and how far the positives' mean lies below it.

    Sums are relative to the row's largest similarity, which is subtracted before the scale: the difference of two close
    ones is exact, and no fused multiply-add rounds it otherwise in the backward pass. hardness None: uniform weights.
    """
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    sign, rate = sign_and_rate(tl.load(scale))
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    powers = tl.zeros([BLOCK_I], tl.float32)
    heaviest = tl.full([BLOCK_I], -INF, tl.float32)
    weights = tl.zeros([BLOCK_I], tl.float32)
    gap = tl.zeros([BLOCK_I], tl.float32)
    low, high = meeting(anchor_start, anchor_end, num_regions, first_row, first_row + BLOCK_I)
    for region in range(low, high):
        first_anchor, last_anchor = tl.load(anchor_start + region), tl.load(anchor_end + region)
        member = (rows >= first_anchor) & (rows < last_anchor)
        whole = (first_row >= first_anchor) & (first_row + BLOCK_I <= last_anchor)
        outer_start, outer_end, inner_start, inner_end, own_start, own_end = hulls(start, end, own, member)
        begin, _, _, stop = spans(
            outer_start, outer_end, inner_start, inner_end,
            tl.load(key_start + region), tl.load(key_end + region), "others",
        )  # fmt: skip
        for first in range(begin, stop, BLOCK_J):
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < stop, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            signed = similarity * sign
            clean = is_clean(
                outer_start, outer_end, inner_start, inner_end, own_start, own_end, first, first + BLOCK_J, "others"
            )
            if not (clean & whole & (first + BLOCK_J <= stop)):
                counted = counts(start[:, None], end[:, None], own[:, None], columns[None, :], "others")
                signed = tl.where(counted & member[:, None] & (columns < stop)[None, :], signed, -INF)
            higher = tl.maximum(largest, tl.max(signed, 1))
            base = tl.where(higher == -INF, 0.0, higher)
            rise = tl.where(largest == -INF, 0.0, base - largest)
            largest = higher
            below = base[:, None] - signed
            powers = powers * tl.exp2(-rise * rate) + tl.sum(tl.exp2(-below * rate), 1)
            gap += weights * rise
            if (first < outer_end) & (first + BLOCK_J > outer_start):
                positive = counts_read(pos_start, pos_end, self_pos, rows, there, columns, "positives")
                positive = positive & member[:, None] & (columns < stop)[None, :]
                below = tl.where(positive, below, 0.0)
                if hardness is None:
                    nearest, farthest = tl.maximum(start, first), tl.minimum(tl.minimum(end, first + BLOCK_J), stop)
                    number = tl.maximum(number_of_positives(nearest, farthest, own), 0.0)
                    weights += tl.where(member, number, 0.0)
                    gap += tl.sum(below, 1)
                else:
                    hard = tl.where(positive, similarity * (-hardness * LOG2E), -INF)
                    harder = tl.maximum(heaviest, tl.max(hard, 1))
                    weight_base = tl.where(harder == -INF, 0.0, harder)
                    kept = tl.exp2(heaviest - weight_base)
                    weight = tl.exp2(hard - weight_base[:, None])
                    weights = weights * kept + tl.sum(weight, 1)
                    gap = gap * kept + tl.sum(weight * below, 1)
                    heaviest = harder
    base = tl.where(largest == -INF, 0.0, largest)
    log_powers = tl.log2(powers)
    filled = weights != 0  # also of NaN, which the loss then shows
    mean_gap = gap / tl.where(filled, weights, 1.0)
    tl.store(loss + rows, tl.where(filled, log_powers + mean_gap * rate, 0.0) * LN2, mask=there)
    tl.store(lse + rows, (log_powers + base * rate) * LN2, mask=there)
    weight_base = tl.where(heaviest == -INF, 0.0, heaviest)
    tl.store(mass + rows, (tl.log2(weights) + weight_base) * LN2, mask=there)
    tl.store(shift + rows, base, mask=there)
    tl.store(total + rows, powers, mask=there)


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, grad_lse, mass, shift, total, pos_start, pos_end, self_pos, scale, hardness,
    largest_grads, lift, statistics, num_rows, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per anchor (shift, factor of p, factor of w, mass), as `slope` and `subtract_positives` take them.

    Uniform weights are divided by the number of positives as p is by the total: where all positives are one point,
    these are equal, and p - w is 0 to the last bit.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    mass_i = tl.load(mass + rows, mask=there, other=-INF)
    filled = mass_i != -INF
    powers = tl.load(total + rows, mask=there, other=0.0)
    of_positives = tl.load(grad + rows * grad_stride, mask=filled, other=0.0)
    of_all = of_positives
    if grad_lse is not None:
        of_all += tl.load(grad_lse + rows, mask=powers > 0, other=0.0)
    factor = tl.load(scale)
    if lift is not None:
        lifted = lift_of(largest_of(largest_grads, grad_stride, num_rows, BLOCK), tl.abs(factor))
        tl.store(lift, lifted)
        factor *= lifted
    of_all, of_positives = of_all * factor, of_positives * factor
    if hardness is None:
        start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, filled)
        of_positives /= tl.where(filled, number_of_positives(start, end, own), 1.0)
    here = statistics + rows.to(tl.int64) * 4
    # With the sign of the scale, which `slope` then need not take from each similarity: all of this is exact.
    sign, _ = sign_and_rate(tl.load(scale))
    tl.store(here, sign * tl.where(powers > 0, tl.load(shift + rows, mask=there, other=0.0), INF), mask=there)
    tl.store(here + 1, of_all / tl.where(powers > 0, powers, 1.0), mask=there)
    tl.store(here + 2, of_positives, mask=there)
    tl.store(here + 3, tl.where(filled, mass_i * LOG2E, INF), mask=there)


@triton.jit
def sign_and_rate(scale):
    """The sign of the scale, and its size for powers of 2."""
    return tl.where(scale < 0, -1.0, 1.0), tl.abs(scale) * LOG2E


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, hardness, pull, discount,
    TERM: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Of each pair g scale p, both directions added: what all keys contribute. The second result is not used.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is), None where a side has none.
    Takes and returns what that of `pair_mean` does.
    """
    rate = scale * LOG2E
    slopes = tl.zeros_like(similarity)
    if own is not None:
        shift, factor, _, _ = own
        slopes += tl.exp2((similarity - shift[:, None]) * rate) * factor[:, None]
    if other is not None:
        shift, factor, _, _ = other
        slopes += tl.exp2((similarity - shift[None, :]) * rate) * factor[None, :]
    return slopes, slopes


@triton.jit
def subtract_positives(slopes, similarity, positive, own, other, hardness):
    """The slopes of `slope` less g scale w of the positive pairs."""
    # Both directions are added as `slope` adds them: equal ones leave nothing.
    weights = tl.zeros_like(similarity)
    if own is not None:
        _, _, factor, mass = own
        weights += weight_of(similarity, mass[:, None], hardness) * factor[:, None]
    if other is not None:
        _, _, factor, mass = other
        weights += weight_of(similarity, mass[None, :], hardness) * factor[None, :]
    return slopes - tl.where(positive, weights, 0.0)


@triton.jit
def weight_of(similarity, mass, hardness):
    """Weight of a positive; of uniform weights the factor holds all."""
    weight = 1.0
    if hardness is not None:
        weight = tl.exp2(similarity * (-hardness * LOG2E) - mass)
    return weight
