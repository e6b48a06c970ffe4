"""Sums over intervals of rows: the mean of a linear term over the positives, and the means of segments.

The sum of an interval is that of its whole blocks, from sums made once, and of the rows at its two ends. Everything is
added up in a fixed order in fp32; nothing is a difference of prefix sums, which would keep the rounding of all rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import launch
from hpcloss.backends.triton.launch import int32
from hpcloss.backends.triton.tile import FARTHEST, INF, LN2, LOG2E, load_rows, meeting, row_intervals, store_rows

BLOCK = 64  # rows of a block sum, and block sums of a sum of those
FEW = 512  # up to so many rows, or block sums, have no block sums
ROWS, TILE = 64, 4096  # most rows, and numbers, of a tile
SHORT = tl.constexpr(8)  # keys that each row reads for itself rather than sums with the rows that share them


# -------------------------------------------------------------------------------------------------- sums of rows


@triton.jit
def weights_of(grad, mass, rows, there):
    """a_i = g_i / |positives of i|, 0 where there are none; mass_i = log |positives of i|."""
    count = tl.floor(tl.exp2(tl.load(mass + rows, mask=there, other=-INF) * LOG2E) + 0.5)
    share = tl.load(grad + rows, mask=there, other=0.0) / tl.maximum(count, 1.0)
    return tl.where(count > 0, share, 0.0)


@triton.jit
def span_sum(rows, grad, mass, first, hole, rest, last, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum [BLOCK_D] of rows first:hole and rest:last, each times its `weights_of` where there is a grad."""
    total = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    before = tl.cdiv(hole - first, BLOCK_J)
    for tile in range(before + tl.cdiv(last - rest, BLOCK_J)):
        begin = tl.where(tile < before, first + tile * BLOCK_J, rest + (tile - before) * BLOCK_J)
        row = begin + tl.arange(0, BLOCK_J)
        inside = row < tl.where(tile < before, hole, last)
        part = load_rows(rows, row, inside, D, BLOCK_D).to(tl.float32)
        if grad is not None:
            part *= weights_of(grad, mass, row, inside)[:, None]
        total += part
    return tl.sum(total, 0)


@triton.jit
def whole_blocks(first, last, BLOCK: tl.constexpr):
    """The blocks low:high that lie in first:last, and the hole:rest that they fill; nothing but first:last if none."""
    low, high = tl.cdiv(first, BLOCK), last // BLOCK
    some = low < high
    return low, tl.maximum(low, high), tl.where(some, low * BLOCK, last), tl.where(some, high * BLOCK, last)


@triton.jit
def interval_sum(
    rows, grad, mass, sums, sums_of_sums, first, last,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum [BLOCK_D] of rows first:last (first <= last), weighted as in `span_sum`; `sums` are of rows weighted alike.

    Reads at most 2 BLOCK rows, 2 BLOCK sums, and the sums of sums between; None: one level down there are few.
    """
    low, high, hole, rest = last, last, last, last
    if sums is not None:
        low, high, hole, rest = whole_blocks(first, last, BLOCK)
    total = span_sum(rows, grad, mass, first, hole, rest, last, D, BLOCK_J, BLOCK_D)
    if sums is not None:
        low_of_sums, high_of_sums, hole, rest = high, high, high, high
        if sums_of_sums is not None:
            low_of_sums, high_of_sums, hole, rest = whole_blocks(low, high, BLOCK)
        total += span_sum(sums, None, None, low, hole, rest, high, D, BLOCK_J, BLOCK_D)
        if sums_of_sums is not None:
            total += span_sum(
                sums_of_sums, None, None, low_of_sums, high_of_sums, high_of_sums, high_of_sums, D, BLOCK_J, BLOCK_D
            )
    return total


@triton.jit(do_not_specialize=["num_rows"])
def block_sums_kernel(
    rows, grad, mass, sums, weighted_sums, num_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums [cdiv(num_rows, BLOCK), D] of BLOCK consecutive rows each; with a grad also those of the weighted rows."""
    first = tl.program_id(0) * BLOCK
    last = tl.minimum(first + BLOCK, num_rows)
    channels = tl.arange(0, BLOCK_D)
    here = tl.program_id(0).to(tl.int64) * D + channels
    total = span_sum(rows, None, None, first, last, last, last, D, BLOCK_J, BLOCK_D)
    tl.store(sums + here, total, mask=channels < D)
    if grad is not None:
        total = span_sum(rows, grad, mass, first, last, last, last, D, BLOCK_J, BLOCK_D)
        tl.store(weighted_sums + here, total, mask=channels < D)


# ---------------------------------------------------------------------------------------- the linear term's mean


@triton.jit
def members(starts, ends, count, first_row, rows, BLOCK_I: tl.constexpr):
    """Whether each of the BLOCK_I rows from first_row on lies in one of the intervals [starts, ends)."""
    low, high = meeting(starts, ends, count, first_row, first_row + BLOCK_I)
    member = rows < 0
    for number in range(low, high):
        member = member | ((rows >= tl.load(starts + number)) & (rows < tl.load(ends + number)))
    return member


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def linear_forward_kernel(
    rows_of_x, sums, sums_of_sums, scale, out, mass, slope_of_stat,
    pos_start, pos_end, self_pos, anchor_start, anchor_end, num_rows, num_regions,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = scale <x_i, sum_{j in P(i)} x_j> / |P(i)| and mass_i = log |P(i)| of BLOCK_I rows; P(i) is without i.

    Rows with few positives read them each for itself, all at once. The others in runs that share their positives.
    """
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    inside = (own >= start) & (own < end)
    anchor = members(anchor_start, anchor_end, num_regions, first_row, rows, BLOCK_I)
    count = tl.where(anchor, tl.maximum(end - start, 0) - tl.where(inside, 1, 0), 0)
    x = load_rows(rows_of_x, rows, count > 0, D, BLOCK_D).to(tl.float32)
    short = (count > 0) & (end - start <= SHORT)
    total = tl.zeros([BLOCK_I], tl.float32)
    for step in range(tl.max(tl.where(short, end - start, 0))):
        key = start + step
        y = load_rows(rows_of_x, key, short & (key < end) & (key != own), D, BLOCK_D).to(tl.float32)
        total += tl.sum(x * y, 1)
    pending = (count > 0) & (end - start > SHORT)
    row = tl.min(tl.where(pending, rows, FARTHEST))
    while row < FARTHEST:
        first, last = tl.load(pos_start + row), tl.load(pos_end + row)
        run = pending & (start == first) & (end == last)
        shared = interval_sum(rows_of_x, None, None, sums, sums_of_sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
        others = shared[None, :] - tl.where(inside[:, None], x, 0.0)
        total = tl.where(run, tl.sum(x * others, 1), total)
        pending = pending & (~run)
        row = tl.min(tl.where(pending, rows, FARTHEST))
    counted = count.to(tl.float32)
    tl.store(out + rows, tl.load(scale) * total / tl.maximum(counted, 1.0), mask=there)
    tl.store(mass + rows, tl.log2(counted) * LN2, mask=there)
    tl.store(slope_of_stat + rows, tl.zeros_like(total), mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def linear_backward_kernel(
    rows_of_x, grad, mass, sums, sums_of_sums, weighted_sums, sums_of_weighted_sums, scale, gradient,
    pos_start, pos_end, self_pos, key_start, key_end, num_rows, num_regions,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient_i = scale (a_i sum_{j in P(i)} x_j + sum_{j in P(i)} a_j x_j) of BLOCK_I rows, a as in `weights_of`.

    Each pair counts once for either side, since j is in P(i) where i is in P(j); keys alone have a = 0.
    """
    first_row = tl.program_id(0) * BLOCK_I
    rows = first_row + tl.arange(0, BLOCK_I)
    there = rows < num_rows
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    member = there & members(key_start, key_end, num_regions, first_row, rows, BLOCK_I)
    weight = weights_of(grad, mass, rows, there)
    short = member & (end - start <= SHORT)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for step in range(tl.max(tl.where(short, end - start, 0))):
        key = start + step
        counted = short & (key < end) & (key != own)
        y = load_rows(rows_of_x, key, counted, D, BLOCK_D).to(tl.float32)
        total += (weight + weights_of(grad, mass, key, counted))[:, None] * y
    long = member & (end - start > SHORT)
    pending = long
    row = tl.min(tl.where(pending, rows, FARTHEST))
    while row < FARTHEST:
        first, last = tl.load(pos_start + row), tl.load(pos_end + row)
        run = pending & (start == first) & (end == last)
        shared = interval_sum(rows_of_x, None, None, sums, sums_of_sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
        weighted = interval_sum(
            rows_of_x, grad, mass, weighted_sums, sums_of_weighted_sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D
        )
        total = tl.where(run[:, None], weight[:, None] * shared[None, :] + weighted[None, :], total)
        pending = pending & (~run)
        row = tl.min(tl.where(pending, rows, FARTHEST))
    itself = load_rows(rows_of_x, rows, long & (own >= start) & (own < end), D, BLOCK_D).to(tl.float32)
    total -= 2 * weight[:, None] * itself
    store_rows(gradient, rows, there, tl.load(scale) * total, D, BLOCK_D)


def linear_mean(anchors: Tensor, scale: Tensor, intervals: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_mean` with uniform weights and the term scale s in self-contrast: out, mass and a slope of 0, [N] each."""
    # A tensor each: rows of one are aligned for some N alone, and either case is a kernel of its own.
    out, mass, slope = (torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device) for _ in range(3))
    *positives, anchor_start, anchor_end, _, _ = int32(intervals)
    sums, _ = _block_sums(anchors)
    block = _tile_rows(anchors)
    _launch(
        linear_forward_kernel, triton.cdiv(anchors.shape[0], block),
        anchors, sums, _block_sums(sums)[0], scale, out, mass, slope,
        *positives, anchor_start, anchor_end, anchors.shape[0], anchor_start.numel(), BLOCK_I=block, BLOCK_J=block,
    )  # fmt: skip
    return out, mass, slope


def linear_mean_backward(
    grad: Tensor,
    out: Tensor,
    mass: Tensor,
    anchors: Tensor,
    scale: Tensor,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_mean`: of the rows [N, D], of keys that are not there, of the scale."""
    grad = grad.to(torch.float32).contiguous()
    gradient = torch.empty(anchors.shape if needs_anchors else (0,), dtype=torch.float32, device=anchors.device)
    if needs_anchors:
        *positives, _, _, key_start, key_end = int32(intervals)
        sums, weighted = _block_sums(anchors, grad, mass)
        block = _tile_rows(anchors)
        _launch(
            linear_backward_kernel, triton.cdiv(anchors.shape[0], block),
            anchors, grad, mass, sums, _block_sums(sums)[0], weighted, _block_sums(weighted)[0], scale, gradient,
            *positives, key_start, key_end, anchors.shape[0], key_start.numel(), BLOCK_I=block, BLOCK_J=block,
        )  # fmt: skip
    d_scale = torch.zeros((), dtype=torch.float32, device=anchors.device)
    if needs_scale:
        d_scale = (torch.where(mass == -math.inf, 0.0, grad) * out).sum() / scale.to(torch.float32)
    return gradient, gradient.new_empty(0), d_scale


# ---------------------------------------------------------------------------------------------- means of segments


@triton.jit
def segment_mean_kernel(
    rows, sums, sums_of_sums, offsets, means,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means_s = mean of rows offsets[s]:offsets[s + 1], zero where there are none; one segment a program."""
    segment = tl.program_id(0)
    first, last = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    total = interval_sum(rows, None, None, sums, sums_of_sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
    channels = tl.arange(0, BLOCK_D)
    mean = total / tl.maximum(last - first, 1).to(tl.float32)
    tl.store(means + segment.to(tl.int64) * D + channels, mean, mask=channels < D)


def segment_mean(rows: Tensor, offsets: Tensor) -> Tensor:
    """Means [S, D] of rows offsets[s]:offsets[s + 1]; a zero row for an empty segment."""
    count = offsets.numel() - 1
    means = torch.empty(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    sums, _ = _block_sums(rows)
    _launch(segment_mean_kernel, count, rows, sums, _block_sums(sums)[0], *int32([offsets]), means)
    return means


# ------------------------------------------------------------------------------------------------------ launching


def _block_sums(
    rows: Tensor | None, grad: Tensor | None = None, mass: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of BLOCK rows each, plain and, with a grad, weighted; None where the rows are few."""
    if rows is None or rows.shape[0] <= FEW:
        return None, None
    sums = torch.empty(triton.cdiv(rows.shape[0], BLOCK), rows.shape[1], dtype=torch.float32, device=rows.device)
    weighted = None if grad is None else torch.empty_like(sums)
    _launch(block_sums_kernel, sums.shape[0], rows, grad, mass, sums, weighted, rows.shape[0])
    return sums, weighted


def _tile_rows(rows: Tensor, numbers: int = TILE) -> int:
    """Rows of a tile of so many numbers. These sizes keep everything in the registers of 4 warps at any width."""
    return min(ROWS, numbers // triton.next_power_of_2(rows.shape[1]))


def _launch(kernel: Any, programs: int, rows: Tensor, *args: Any, **constants: Any) -> None:
    """Run that many programs on rows [N, D], the first argument."""
    sizes = {"D": rows.shape[1], "BLOCK": BLOCK, "BLOCK_J": _tile_rows(rows, TILE // 2)}
    sizes["BLOCK_D"] = triton.next_power_of_2(rows.shape[1])
    launch.run(kernel, programs, rows, rows, *args, **sizes | constants, num_warps=4)
