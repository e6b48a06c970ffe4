"""`pair_lse`: forward kernel, and what its backward pass says of one pair."""

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
    row_intervals,
    similarities,
    spans,
)


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    anchors, keys, bias, scale, lse,
    pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start, key_end, num_rows, num_regions,
    D: tl.constexpr, RULE: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) of BLOCK_I anchors; -inf where nothing is summed.

    ONLINE: with a running maximum; without, exp(scale s_ij) must be known to stay finite.
    """
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    x = load_rows(anchors, rows, there, D, BLOCK_D)
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    exponent_scale = tl.load(scale) * LOG2E
    largest = tl.full([BLOCK_I], -INF, tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    low, high = meeting(anchor_start, anchor_end, num_regions, first_row, first_row + BLOCK_I)
    for region in range(low, high):
        first_anchor, last_anchor = tl.load(anchor_start + region), tl.load(anchor_end + region)
        member = (rows >= first_anchor) & (rows < last_anchor)
        whole = (first_row >= first_anchor) & (first_row + BLOCK_I <= last_anchor)
        outer_start, outer_end, inner_start, inner_end, own_start, own_end = hulls(start, end, own, member)
        begin, hole, rest, stop = spans(
            outer_start, outer_end, inner_start, inner_end, tl.load(key_start + region), tl.load(key_end + region), RULE
        )
        before = tl.cdiv(hole - begin, BLOCK_J)
        for tile in range(before + tl.cdiv(stop - rest, BLOCK_J)):
            first = tl.where(tile < before, begin + tile * BLOCK_J, rest + (tile - before) * BLOCK_J)
            last = tl.where(tile < before, hole, stop)
            columns = first + tl.arange(0, BLOCK_J)
            y = load_rows(keys, columns, columns < last, D, BLOCK_D)
            exponent = similarities(x, y, PRECISION) * exponent_scale
            if bias is not None:
                exponent += tl.load(bias + columns, mask=columns < last, other=0.0)[None, :] * LOG2E
            clean = is_clean(
                outer_start, outer_end, inner_start, inner_end, own_start, own_end, first, first + BLOCK_J, RULE
            )
            if not (clean & whole & (first + BLOCK_J <= last)):
                counted = counts(start[:, None], end[:, None], own[:, None], columns[None, :], RULE)
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


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def statistics_kernel(
    grad, grad_stride, lse, scale, largest_grads, lift, statistics, num_rows, ONLINE: tl.constexpr, BLOCK: tl.constexpr
):
    """Per anchor (shift, factor, factor of d scale, 0), so that `slope` is exp2(. - shift) times a factor."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
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
    here = statistics + rows.to(tl.int64) * 4
    tl.store(here, shift, mask=there)
    tl.store(here + 1, grad_i * tl.load(scale), mask=there)
    tl.store(here + 2, grad_i, mask=there)
    tl.store(here + 3, 0.0, mask=there)


@triton.jit
def slope(
    similarity, own, other, own_bias, other_bias, scale, hardness, pull, discount,
    TERM: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """Of each pair d loss/ds = g scale exp(scale s + bias - lse), both directions added, and the own d loss/dscale.

    own, other: statistics of the own rows (i is the anchor) and of the other rows (j is), None where a side has none.
    Takes what that of `pair_mean` takes.
    """
    exponent = similarity * (scale * LOG2E)
    slopes = tl.zeros_like(similarity)
    along_scale = slopes
    if own is not None:
        shift, factor, scale_factor, _ = own
        weight = directed(exponent, other_bias, shift[:, None], ONLINE)
        slopes += weight * factor[:, None]
        along_scale = weight * (scale_factor[:, None] * similarity)
    if other is not None:
        shift, factor, _, _ = other
        slopes += directed(exponent, own_bias, shift[None, :], ONLINE) * factor[None, :]
    return slopes, along_scale


@triton.jit
def directed(exponent, key_bias, shift, ONLINE: tl.constexpr):
    """exp(scale s + bias - lse) in the direction of the statistics; without ONLINE their factor holds the lse."""
    if key_bias is not None:
        exponent += key_bias * LOG2E
    if ONLINE:
        exponent -= shift
    return tl.exp2(exponent)
