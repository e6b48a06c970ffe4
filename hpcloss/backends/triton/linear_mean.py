"""The mean of a linear term over the positives without pairs, in self-contrast: sums of rows are enough.

Positives are intervals of rows, whose sums come from sums made once (segment_mean.py).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import configs, launch
from hpcloss.backends.triton.segment_mean import interval_sum, over_rows, sums_of, tile_rows, weights_of
from hpcloss.backends.triton.tiles import (
    FARTHEST,
    LN2,
    Intervals,
    block_of,
    load_rows,
    regions_met,
    row_intervals,
    store_rows,
)

SHORT = tl.constexpr(8)  # each row reads up to so many keys itself; more are summed for the rows that share them


@triton.jit
def in_regions(intervals, num_regions, first_row, rows, BLOCK_I: tl.constexpr):
    """Whether each of the BLOCK_I rows from first_row on lies in one of the regions."""
    low, high = regions_met(intervals, num_regions, first_row, BLOCK_I)
    member = rows < 0
    for region in range(low, high):
        start, end = tl.load(intervals.own_start + region), tl.load(intervals.own_end + region)
        member = member | ((rows >= start) & (rows < end))
    return member


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def forward_kernel(
    all_rows, sums, intervals, scale, out, mass, slope, num_rows, num_regions,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = scale <x_i, sum_{j in P(i)} x_j> / |P(i)| and mass_i = log |P(i)| of BLOCK_I rows; P(i) is without i.

    Rows with few positives read them one by one, all rows at once. Other rows are handled in runs that share positives.
    """
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    start, end, self_key = row_intervals(intervals, rows, there)
    inside = (self_key >= start) & (self_key < end)
    anchor = in_regions(intervals, num_regions, first_row, rows, BLOCK_I)
    count = tl.where(anchor, tl.maximum(end - start, 0) - tl.where(inside, 1, 0), 0)
    x = load_rows(all_rows, rows, count > 0, D, BLOCK_D).to(tl.float32)
    short = (count > 0) & (end - start <= SHORT)
    total = tl.zeros([BLOCK_I], tl.float32)
    for step in range(tl.max(tl.where(short, end - start, 0))):
        key = start + step
        y = load_rows(all_rows, key, short & (key < end) & (key != self_key), D, BLOCK_D).to(tl.float32)
        total += tl.sum(x * y, 1)
    pending = (count > 0) & (end - start > SHORT)
    row = tl.min(tl.where(pending, rows, FARTHEST))
    while row < FARTHEST:
        first, last = tl.load(intervals.pos_start + row), tl.load(intervals.pos_end + row)
        run = pending & (start == first) & (end == last)
        shared = interval_sum(all_rows, None, None, sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
        others = shared[None, :] - tl.where(inside[:, None], x, 0.0)
        total = tl.where(run, tl.sum(x * others, 1), total)
        pending = pending & (~run)
        row = tl.min(tl.where(pending, rows, FARTHEST))
    counted = count.to(tl.float32)
    tl.store(out + rows, tl.load(scale) * total / tl.maximum(counted, 1.0), mask=there)
    tl.store(mass + rows, tl.log2(counted) * LN2, mask=there)
    tl.store(slope + rows, tl.zeros_like(total), mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_regions"])
def backward_kernel(
    all_rows, grad, mass, sums, weighted_sums, intervals, scale, gradient, num_rows, num_regions,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient_i = scale (a_i sum_{j in P(i)} x_j + sum_{j in P(i)} a_j x_j) of BLOCK_I rows, a as in `weights_of`.

    Each pair counts once for either side, since j is in P(i) if and only if i is in P(j). Keys that are no anchors have
    a = 0.
    """
    first_row, rows, there = block_of(num_rows, BLOCK_I)
    start, end, self_key = row_intervals(intervals, rows, there)
    member = there & in_regions(intervals, num_regions, first_row, rows, BLOCK_I)
    weight = weights_of(grad, mass, rows, there)
    short = member & (end - start <= SHORT)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for step in range(tl.max(tl.where(short, end - start, 0))):
        key = start + step
        counted = short & (key < end) & (key != self_key)
        y = load_rows(all_rows, key, counted, D, BLOCK_D).to(tl.float32)
        total += (weight + weights_of(grad, mass, key, counted))[:, None] * y
    long = member & (end - start > SHORT)
    pending = long
    row = tl.min(tl.where(pending, rows, FARTHEST))
    while row < FARTHEST:
        first, last = tl.load(intervals.pos_start + row), tl.load(intervals.pos_end + row)
        run = pending & (start == first) & (end == last)
        shared = interval_sum(all_rows, None, None, sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
        weighted = interval_sum(all_rows, grad, mass, weighted_sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
        total = tl.where(run[:, None], weight[:, None] * shared[None, :] + weighted[None, :], total)
        pending = pending & (~run)
        row = tl.min(tl.where(pending, rows, FARTHEST))
    itself = load_rows(all_rows, rows, long & (self_key >= start) & (self_key < end), D, BLOCK_D).to(tl.float32)
    total -= 2 * weight[:, None] * itself
    store_rows(gradient, rows, there, tl.load(scale) * total, D, BLOCK_D)


def linear_mean(anchors: Tensor, scale: Tensor, intervals: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_mean` with uniform weights and the term scale s in self-contrast: out, mass and a slope of 0, [N] each."""
    # One tensor each. Rows of a joint tensor are aligned for some N only, and Triton compiles a kernel for either case.
    out, mass, slope = (torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device) for _ in range(3))
    at = Intervals(*launch.int32(intervals[:5]))  # the anchors' regions
    sums, _ = sums_of(anchors)
    block = tile_rows(anchors)
    over_rows(
        forward_kernel, configs.blocks_of(anchors.shape[0], block), anchors,
        sums, at, scale, out, mass, slope,
        anchors.shape[0], at.own_start.numel(), BLOCK_I=block, BLOCK_J=block,
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
        at = Intervals(*launch.int32([*intervals[:3], *intervals[5:]]))  # the keys' regions
        sums, weighted_sums = sums_of(anchors, grad, mass)
        block = tile_rows(anchors)
        over_rows(
            backward_kernel, configs.blocks_of(anchors.shape[0], block), anchors,
            grad, mass, sums, weighted_sums, at, scale, gradient,
            anchors.shape[0], at.own_start.numel(), BLOCK_I=block, BLOCK_J=block,
        )  # fmt: skip
    d_scale = torch.zeros((), dtype=torch.float32, device=anchors.device)
    if needs_scale:
        d_scale = (torch.where(mass == -math.inf, 0.0, grad) * out).sum() / scale.to(torch.float32)
    return gradient, gradient.new_empty(0), d_scale
