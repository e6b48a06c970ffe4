"""The backward pass of every primitive: one kernel that owns rows of one side and streams the rows of the other.

A pair (i, j) has up to two directions: i as the anchor (ROW, from the statistics of the own rows) and j as the anchor
(COL, from those of the other rows). Self-contrast needs both, so one pass gives dX_i = sum_j (dS_ij + dS_ji) x_j; of
separate keys, ROW alone gives the anchors' gradient and COL alone the keys'. No atomics: each program owns its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpcloss.backends.triton.pair_cross_entropy import subtract_positives
from hpcloss.backends.triton.tile import (
    column_intervals,
    counts,
    counts_read,
    hulls,
    is_clean,
    load_rows,
    load_statistics,
    meeting,
    meeting_in_any_order,
    row_intervals,
    similarities,
    spans,
    store_rows,
)


@triton.jit(do_not_specialize=["num_rows", "num_others", "num_regions"])
def backward_kernel(
    rows_of_own, rows_of_other, own_statistics, other_statistics, key_bias, scale, hardness, pull, discount, lift,
    gradient, scale_gradient, pos_start, pos_end, self_pos,
    own_start, own_end, other_start, other_end, anchor_start, anchor_end, num_rows, num_others, num_regions,
    D: tl.constexpr, SLOPE: tl.constexpr, TERM: tl.constexpr, RULE: tl.constexpr, ONLINE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient_i = sum_j dS_ij y_j of BLOCK_I own rows, and each anchor's part of d scale.

    own_statistics None: the own rows are keys alone, and intervals are those of the other rows. other_statistics None:
    the other rows are keys alone. anchor_start, anchor_end: in self-contrast, which rows of a region are anchors.
    """
    ROW: tl.constexpr = own_statistics is not None
    COL: tl.constexpr = other_statistics is not None
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    x = load_rows(rows_of_own, rows, there, D, BLOCK_D)
    logit_scale = tl.load(scale)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    by_scale = tl.zeros([BLOCK_I], tl.float32)
    own_side, own_bias = None, None
    if ROW:
        start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
        own_side = load_statistics(own_statistics, rows, there)
    if COL and key_bias is not None:
        own_bias = tl.load(key_bias + rows, mask=there, other=0.0)[:, None]
    if ROW:
        low, high = meeting(own_start, own_end, num_regions, first_row, first_row + BLOCK_I)
    else:
        low, high = meeting_in_any_order(own_start, own_end, num_regions, first_row, first_row + BLOCK_I)
    for region in range(low, high):
        first_own, last_own = tl.load(own_start + region), tl.load(own_end + region)
        member = (rows >= first_own) & (rows < last_own)
        whole = (first_row >= first_own) & (first_row + BLOCK_I <= last_own)
        begin, stop = tl.load(other_start + region), tl.load(other_end + region)
        hole, rest = stop, stop
        if ROW:
            outer_start, outer_end, inner_start, inner_end, key_start, key_end = hulls(start, end, own, member)
            begin, hole, rest, stop = spans(outer_start, outer_end, inner_start, inner_end, begin, stop, RULE)
        elif RULE == "positives":
            # The anchors whose positives are among the own rows.
            low_met, high_met = meeting_in_any_order(
                pos_start + begin, pos_end + begin, stop - begin, first_row, first_row + BLOCK_I
            )
            begin, stop = begin + low_met, begin + high_met
            hole, rest = stop, stop
        if anchor_start is not None:
            # Rows that are keys alone meet anchors alone.
            first_anchor, last_anchor = tl.load(anchor_start + region), tl.load(anchor_end + region)
            if (first_row >= last_anchor) | (first_row + BLOCK_I <= first_anchor):
                begin, hole = tl.maximum(begin, first_anchor), tl.minimum(hole, last_anchor)
                rest, stop = tl.maximum(rest, first_anchor), tl.minimum(stop, last_anchor)
        before = tl.maximum(tl.cdiv(hole - begin, BLOCK_J), 0)
        for tile in range(before + tl.maximum(tl.cdiv(stop - rest, BLOCK_J), 0)):
            first = tl.where(tile < before, begin + tile * BLOCK_J, rest + (tile - before) * BLOCK_J)
            last = tl.where(tile < before, hole, stop)
            columns = first + tl.arange(0, BLOCK_J)
            inside = columns < last
            y = load_rows(rows_of_other, columns, inside, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            other, other_bias = None, None
            if COL:
                other = load_statistics(other_statistics, columns, inside)
            if ROW and key_bias is not None:
                other_bias = tl.load(key_bias + columns, mask=inside, other=0.0)[None, :]
            slopes, along_scale = SLOPE(
                similarity, own_side, other, own_bias, other_bias, logit_scale, hardness, pull, discount, TERM, ONLINE
            )
            # The intervals are the anchors': the own rows', or where these are keys alone those of the other rows.
            if not ROW:
                starts, ends, selves = column_intervals(pos_start, pos_end, self_pos, columns, inside)
                starts, ends, selves = starts[None, :], ends[None, :], selves[None, :]
            if TERM == "cross_entropy":
                if ROW:
                    if (first < outer_end) & (first + BLOCK_J > outer_start):
                        positive = counts_read(pos_start, pos_end, self_pos, rows, there, columns, "positives")
                        slopes = subtract_positives(slopes, similarity, positive, own_side, other, hardness)
                else:
                    positive = counts(starts, ends, selves, rows[:, None], "positives")
                    slopes = subtract_positives(slopes, similarity, positive, own_side, other, hardness)
            clean = RULE == "every"
            if ROW:
                clean = is_clean(
                    outer_start, outer_end, inner_start, inner_end, key_start, key_end, first, first + BLOCK_J, RULE
                )
            if not (clean & whole & (first + BLOCK_J <= last)):
                if ROW:
                    counted = counts_read(pos_start, pos_end, self_pos, rows, there, columns, RULE)
                else:
                    counted = counts(starts, ends, selves, rows[:, None], RULE)
                counted = counted & member[:, None] & inside[None, :]
                slopes = tl.where(counted, slopes, 0.0)
                if scale_gradient is not None:
                    along_scale = tl.where(counted, along_scale, 0.0)
            if scale_gradient is not None:
                by_scale += tl.sum(along_scale, 1)
            if gradient is not None:
                total += tl.dot(slopes.to(y.dtype), y, input_precision=PRECISION)
    unlift = 1.0
    if lift is not None:
        unlift = 1.0 / tl.load(lift)
    if gradient is not None:
        store_rows(gradient, rows, there, total * unlift, D, BLOCK_D)
    if scale_gradient is not None:
        tl.store(scale_gradient + rows, by_scale * unlift, mask=there)
