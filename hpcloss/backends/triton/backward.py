"""The backward pass of every primitive: one kernel that owns rows of one side and streams the rows of the other.

A pair (i, j) has up to two directions: i as the anchor (ROW, from the statistics of the own rows) and j as the anchor
(COL, from those of the other rows). Self-contrast needs both, so one pass gives dX_i = sum_j (dS_ij + dS_ji) x_j. With
separate keys, ROW alone gives the anchors' gradient and COL alone the keys'. No atomics: each program owns its rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import configs, launch
from hpcloss.backends.triton.tiles import (
    INF,
    Coefficients,
    Intervals,
    Spans,
    block_of,
    column_intervals,
    columns_count,
    has_positives,
    hull_of,
    in_region,
    is_clean,
    load_rows,
    load_statistics,
    meeting_in_any_order,
    others_met,
    regions_met,
    row_intervals,
    rows_count_read,
    similarities,
    spans_of,
    store_rows,
    tile_of,
)


class Sides(NamedTuple):
    """A value of the rows that a program owns, and the same of the rows that it streams."""

    own: Any
    other: Any


class Gradients(NamedTuple):
    """The results of a pass over the other rows. None: not needed."""

    rows: Any  # [N, D], gradient of the own rows
    scale: Any  # [N], the part of each anchor


class Tile(NamedTuple):
    """The own rows and a tile of the others."""

    rows: Any
    there: Any  # whether each row exists
    columns: Any
    inside: Any  # whether each column exists
    positives: Any  # of the columns, if these are the anchors; None: of the rows, which are loaded again


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def backward_kernel(
    all_rows, statistics, coefficients, gradients, intervals, num_rows, num_regions,
    D: tl.constexpr, SLOPE: tl.constexpr, SUBTRACT: tl.constexpr, TERM: tl.constexpr, RULE: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient_i = sum_j dS_ij y_j of BLOCK_I own rows, and each anchor's part of d scale.

    all_rows, statistics: of both `Sides`. Rows without statistics are keys only. The intervals are those of the own
    rows if these have statistics, otherwise of the other rows. SLOPE: slopes of all pairs. SUBTRACT: those of positive
    pairs, or None.
    """
    ROW: tl.constexpr = statistics.own is not None
    COL: tl.constexpr = statistics.other is not None
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    x = load_rows(all_rows.own, rows, there, D, BLOCK_D)
    scale, bias = tl.load(coefficients.scale), coefficients.key_bias
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    by_scale = tl.zeros([BLOCK_I], tl.float32)
    positives = row_intervals(intervals, rows, there) if ROW else None
    of_own = load_statistics(statistics.own, rows, there) if ROW else None
    own_bias = load_bias(bias, rows, there)[:, None] if COL and bias is not None else None
    low, high = regions_of(intervals, num_regions, first_row, ROW, BLOCK_I)
    for region in range(low, high):
        member, whole = in_region(intervals, region, first_row, rows, BLOCK_I)
        met = others_met(intervals, region)
        hull = hull_of(positives, member) if ROW else None
        spans = spans_of(hull, *met, RULE) if ROW else anchors_met(intervals, *met, first_row, RULE, BLOCK_I)
        if intervals.anchor_start is not None:
            spans = spans_of_keys(spans, intervals, region, first_row, BLOCK_I)
        before = tl.maximum(tl.cdiv(spans.hole - spans.begin, BLOCK_J), 0)
        for number in range(before + tl.maximum(tl.cdiv(spans.stop - spans.rest, BLOCK_J), 0)):
            first, last = tile_of(spans, number, before, BLOCK_J)
            columns = first + tl.arange(0, BLOCK_J)
            inside = columns < last
            y = load_rows(all_rows.other, columns, inside, D, BLOCK_D)
            similarity = similarities(x, y, PRECISION)
            of_other = load_statistics(statistics.other, columns, inside) if COL else None
            other_bias = load_bias(bias, columns, inside)[None, :] if ROW and bias is not None else None
            slopes, along_scale = SLOPE(
                similarity, of_own, of_other, own_bias, other_bias, scale, coefficients, TERM, ONLINE
            )
            of_columns = None if ROW else column_intervals(intervals, columns, inside)
            tile = Tile(rows, there, columns, inside, of_columns)
            if SUBTRACT is not None:
                near = has_positives(hull, first, first + BLOCK_J) if ROW else True
                if near:
                    positive = counted(tile, intervals, "positives")
                    slopes = SUBTRACT(slopes, similarity, positive, of_own, of_other, coefficients)
            clean = is_clean(hull, first, first + BLOCK_J, RULE) if ROW else RULE == "every"
            if not (clean & whole & (first + BLOCK_J <= last)):
                count = counted(tile, intervals, RULE) & member[:, None] & inside[None, :]
                slopes = tl.where(count, slopes, 0.0)
                if gradients.scale is not None:
                    along_scale = tl.where(count, along_scale, 0.0)
            if gradients.scale is not None:
                by_scale += tl.sum(along_scale, 1)
            if gradients.rows is not None:
                total += tl.dot(slopes.to(y.dtype), y, input_precision=PRECISION)
    store_gradients(gradients, rows, there, total, by_scale, coefficients.lift, D, BLOCK_D)


@triton.jit
def counted(tile, intervals, RULE: tl.constexpr):
    """Whether the rule counts each pair of a tile. All pairs are of one region."""
    if tile.positives is None:
        count = rows_count_read(intervals, tile.rows, tile.there, tile.columns, RULE)
    else:
        count = columns_count(tile.positives, tile.rows, RULE)
    return count


@triton.jit
def load_bias(key_bias, keys, there):
    """The bias of some keys, 0 without a bias."""
    return tl.load(key_bias + keys, mask=there, other=0.0)


@triton.jit
def store_gradients(gradients, rows, there, total, by_scale, lift, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the needed gradients, without the lift."""
    unlift = 1.0
    if lift is not None:
        unlift = 1.0 / tl.load(lift)
    if gradients.rows is not None:
        store_rows(gradients.rows, rows, there, total * unlift, D, BLOCK_D)
    if gradients.scale is not None:
        tl.store(gradients.scale + rows, by_scale * unlift, mask=there)


@triton.jit
def regions_of(intervals, num_regions, first_row, ROW: tl.constexpr, BLOCK_I: tl.constexpr):
    """Range of the regions that meet a block of own rows. Regions of rows that are keys only may come in any order."""
    if ROW:
        low, high = regions_met(intervals, num_regions, first_row, BLOCK_I)
    else:
        low, high = meeting_in_any_order(
            intervals.own_start, intervals.own_end, num_regions, first_row, first_row + BLOCK_I
        )
    return low, high


@triton.jit
def anchors_met(intervals, begin, stop, first_row, RULE: tl.constexpr, BLOCK_I: tl.constexpr):
    """The anchors of begin:stop that the own rows meet as keys."""
    if RULE == "positives":
        # The anchors whose positives are among the own rows.
        low, high = meeting_in_any_order(
            intervals.pos_start + begin, intervals.pos_end + begin, stop - begin, first_row, first_row + BLOCK_I
        )
        begin, stop = begin + low, begin + high
    return Spans(begin, stop, stop, stop)


@triton.jit
def spans_of_keys(spans, intervals, region, first_row, BLOCK_I: tl.constexpr):
    """The spans that a block of rows visits in self-contrast: rows that are keys only meet anchors only."""
    begin, stop, hole, rest = spans
    first_anchor, last_anchor = tl.load(intervals.anchor_start + region), tl.load(intervals.anchor_end + region)
    if (first_row >= last_anchor) | (first_row + BLOCK_I <= first_anchor):
        begin, hole = tl.maximum(begin, first_anchor), tl.minimum(hole, last_anchor)
        rest, stop = tl.maximum(rest, first_anchor), tl.minimum(stop, last_anchor)
    return Spans(begin, stop, hole, rest)


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def largest_kernel(grad, grad_stride, empty, largest_grads, num_rows, BLOCK: tl.constexpr):
    """Largest |grad| of each block of rows. A row with -inf in `empty` is left out: its gradient has no meaning."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(empty + rows, mask=rows < num_rows, other=-INF) != -INF
    tl.store(
        largest_grads + tl.program_id(0), tl.max(tl.abs(tl.load(grad + rows * grad_stride, mask=counts, other=0.0)), 0)
    )


@triton.jit
def largest_of(largest_grads, grad_stride, num_rows, BLOCK: tl.constexpr):
    """The largest of the results of `largest_kernel`.

    If all rows have one gradient (stride 0), only that one is read.
    """
    largest = tl.zeros([BLOCK], tl.float32)
    num_blocks = tl.where(grad_stride == 0, 1, tl.cdiv(num_rows, BLOCK))
    for first in range(0, num_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(largest_grads + blocks, mask=blocks < num_blocks, other=0.0)))
    return tl.max(largest, 0)


@triton.jit
def lift_of(largest_grad, bound):
    """Power of two that brings the largest fp16 slope, at most largest_grad * bound, near 8192: small ones survive.

    The two directions of a pair add up, and stay far below the largest fp16 number, 65504.
    """
    largest = largest_grad * bound
    power = tl.exp2(tl.floor(tl.log2(8192.0 / largest)))
    return tl.where((largest > 2.0**-100) & (largest < 2.0**100), power, 1.0)


def gradients_of_pairs(
    anchors: Tensor,
    keys: Tensor | None,
    statistics: Tensor,
    coefficients: Coefficients,
    intervals: list[Tensor],
    constants: dict[str, Any],
    shape: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the anchors' statistics: one pass in self-contrast, otherwise one for each side that needs it."""
    *positives, anchor_start, anchor_end, key_start, key_end = launch.int32(intervals)
    of_anchors, of_keys, given = (anchor_start, anchor_end), (key_start, key_end), (coefficients, constants, shape)
    by_scale = torch.empty_like(statistics[:, 0]) if needs_scale else None
    d_keys = torch.empty(0, dtype=torch.float32, device=anchors.device)
    if keys is None:
        # Every row of a region is a key here and meets its region.
        at = Intervals(*positives, *of_keys, *of_keys, *of_anchors)
        sides = Sides(anchors, anchors), Sides(statistics, statistics)
        d_anchors = gradient_of_side(*sides, at, *given, needs_anchors, by_scale)
    else:
        keys = launch.as_anchors(anchors, keys)
        at, sides = Intervals(*positives, *of_anchors, *of_keys), (Sides(anchors, keys), Sides(statistics, None))
        d_anchors = gradient_of_side(*sides, at, *given, needs_anchors, by_scale)
        if needs_keys:
            at, sides = Intervals(*positives, *of_keys, *of_anchors), (Sides(keys, anchors), Sides(None, statistics))
            d_keys = gradient_of_side(*sides, at, *given, True, None)
    return d_anchors, d_keys, sum_if_wanted(by_scale, anchors)


def gradient_of_side(
    rows: Sides,
    statistics: Sides,
    intervals: Intervals,
    coefficients: Coefficients,
    constants: dict[str, Any],
    shape: str,
    wanted: bool,
    by_scale: Tensor | None,
) -> Tensor:
    """The gradient of the own rows, from one pass over the other rows. by_scale [N] is written if it is given."""
    gradient = torch.empty(rows.own.shape if wanted else (0,), dtype=torch.float32, device=rows.own.device)
    if wanted or by_scale is not None:
        tiling = launch.tiling(shape, rows.own)
        launch.run(
            backward_kernel, tiling.programs, rows.own,
            rows, statistics, coefficients, Gradients(gradient if wanted else None, by_scale), intervals,
            rows.own.shape[0], intervals.own_start.numel(), **constants, **tiling.constants,
        )  # fmt: skip
    return gradient


def sum_if_wanted(by_scale: Tensor | None, rows: Tensor) -> Tensor:
    """The gradient of the scale. If it is not needed, it is not written."""
    return torch.empty((), dtype=torch.float32, device=rows.device) if by_scale is None else by_scale.sum()


def room_for_statistics(
    grad: Tensor, empty: Tensor, rows: Tensor, grad_lse: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Memory for the statistics; for fp16 rows also for the lift of their slopes, and the largest incoming gradients.

    empty [N]: -inf for a row without pairs, whose incoming gradient has no meaning. grad_lse: a second gradient,
    without meaning where `total` [N] is 0.
    """
    grad = grad if grad.dtype == torch.float32 else grad.to(torch.float32)  # the gradient of a mean has stride 0
    statistics = grad.new_empty(grad.numel(), 4)
    if rows.dtype != torch.float16 or not grad.numel():
        return statistics, None, None, grad
    lift = grad.new_empty(())
    if grad_lse is None and grad.stride(0) == 0:
        return statistics, lift, grad, grad  # one gradient for all rows
    bound = grad = grad.contiguous()
    if grad_lse is not None:
        bound = torch.where(empty == -math.inf, 0.0, grad.abs()) + torch.where(total == 0, 0.0, grad_lse.abs())
        empty = bound
    largest = grad.new_empty(configs.blocks_of(grad.numel(), launch.ROWS))
    launch.row_by_row(largest_kernel, bound, bound, bound.stride(0), empty, largest, bound.numel())
    return statistics, lift, largest, grad
