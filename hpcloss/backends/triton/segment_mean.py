"""`segment_mean`, and sums over intervals of rows, which `linear_mean` needs too.

The sum of an interval is the sum of its whole blocks, computed once for all intervals, and of the rows at its two ends.
Everything is added in a fixed order in fp32. A difference of prefix sums would keep the rounding of all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import configs, launch
from hpcloss.backends.triton.tiles import INF, LOG2E, load_rows

BLOCK = 64  # rows of a block sum, and block sums of a sum of block sums
FEW = 512  # no block sums for up to so many rows or block sums
ROWS, TILE = 64, 4096  # largest number of rows and of elements of a tile


class Sums(NamedTuple):
    """Sums of BLOCK consecutive rows each, and of BLOCK consecutive such sums. None if there are few."""

    of_rows: Any
    of_sums: Any


# -------------------------------------------------------------------------------------------------- sums of rows


@triton.jit
def weights_of(grad, mass, rows, there):
    """a_i = g_i / |positives of i|, 0 without positives; mass_i = log |positives of i|."""
    count = tl.floor(tl.exp2(tl.load(mass + rows, mask=there, other=-INF) * LOG2E) + 0.5)
    share = tl.load(grad + rows, mask=there, other=0.0) / tl.maximum(count, 1.0)
    return tl.where(count > 0, share, 0.0)


@triton.jit
def span_sum(rows, grad, mass, first, hole, rest, last, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum [BLOCK_D] of rows first:hole and rest:last. With a grad each is multiplied by its `weights_of`."""
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
    """The blocks low:high inside first:last, and the rows hole:rest that they fill.

    Without a block hole:rest is empty.
    """
    low, high = tl.cdiv(first, BLOCK), last // BLOCK
    some = low < high
    return low, tl.maximum(low, high), tl.where(some, low * BLOCK, last), tl.where(some, high * BLOCK, last)


@triton.jit
def interval_sum(
    rows, grad, mass, sums, first, last,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum [BLOCK_D] of rows first:last (first <= last), weighted as in `span_sum`. `sums` have the same weights.

    Reads at most 2 BLOCK rows, 2 BLOCK sums, and the sums of sums between. None: one level down there are few.
    """
    low, high, hole, rest = last, last, last, last
    if sums.of_rows is not None:
        low, high, hole, rest = whole_blocks(first, last, BLOCK)
    total = span_sum(rows, grad, mass, first, hole, rest, last, D, BLOCK_J, BLOCK_D)
    if sums.of_rows is not None:
        low_of_sums, high_of_sums, hole, rest = high, high, high, high
        if sums.of_sums is not None:
            low_of_sums, high_of_sums, hole, rest = whole_blocks(low, high, BLOCK)
        total += span_sum(sums.of_rows, None, None, low, hole, rest, high, D, BLOCK_J, BLOCK_D)
        if sums.of_sums is not None:
            total += span_sum(
                sums.of_sums, None, None, low_of_sums, high_of_sums, high_of_sums, high_of_sums, D, BLOCK_J, BLOCK_D
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


# ---------------------------------------------------------------------------------------------- means of segments


@triton.jit
def segment_mean_kernel(
    rows, sums, offsets, means,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means_s = mean of rows offsets[s]:offsets[s + 1], zero for an empty segment; one segment per program."""
    segment = tl.program_id(0)
    first, last = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    total = interval_sum(rows, None, None, sums, first, last, D, BLOCK, BLOCK_J, BLOCK_D)
    channels = tl.arange(0, BLOCK_D)
    mean = total / tl.maximum(last - first, 1).to(tl.float32)
    tl.store(means + segment.to(tl.int64) * D + channels, mean, mask=channels < D)


def segment_mean(rows: Tensor, offsets: Tensor) -> Tensor:
    """Means [S, D] of rows offsets[s]:offsets[s + 1]; a zero row for an empty segment."""
    count = offsets.numel() - 1
    means = torch.empty(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    sums, _ = sums_of(rows)
    over_rows(segment_mean_kernel, count, rows, sums, *launch.int32([offsets]), means)
    return means


# ------------------------------------------------------------------------------------------------------ launching


def sums_of(rows: Tensor, grad: Tensor | None = None, mass: Tensor | None = None) -> tuple[Sums, Sums]:
    """The sums of the rows, plain and, with a grad, weighted."""
    plain, weighted = _block_sums(rows, grad, mass)
    return Sums(plain, _block_sums(plain)[0]), Sums(weighted, _block_sums(weighted)[0])


def _block_sums(
    rows: Tensor | None, grad: Tensor | None = None, mass: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    if rows is None or rows.shape[0] <= FEW:
        return None, None
    sums = torch.empty(configs.blocks_of(rows.shape[0], BLOCK), rows.shape[1], dtype=torch.float32, device=rows.device)
    weighted = None if grad is None else torch.empty_like(sums)
    over_rows(block_sums_kernel, sums.shape[0], rows, grad, mass, sums, weighted, rows.shape[0])
    return sums, weighted


def tile_rows(rows: Tensor, numbers: int = TILE) -> int:
    """Rows of a tile of so many numbers. These sizes keep everything in the registers of 4 warps at any width."""
    return min(ROWS, numbers // configs.power_of_2(rows.shape[1]))


def over_rows(kernel: Any, programs: int, rows: Tensor, *args: Any, **constants: Any) -> None:
    """Run that many programs on rows [N, D], the first argument."""
    sizes = {"D": rows.shape[1], "BLOCK": BLOCK, "BLOCK_J": tile_rows(rows, TILE // 2)}
    sizes["BLOCK_D"] = configs.power_of_2(rows.shape[1])
    launch.run(kernel, programs, rows, rows, *args, **sizes | constants, num_warps=4)
