"""Packing as two kernels: pixels of a map in any layout to unit rows [n, D], and the gradient back into the map.

A program owns a block of rows with all their channels, so a row is read once, normalised in registers and written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpcloss.backends.triton import configs, launch
from hpcloss.backends.triton.probe import interpreted
from hpcloss.operators import NORM_EPS

# Entries of a tile, and the warps that share it: 32 entries a thread. Two such tiles (gradient and row) and their
# addresses fit in the registers at any D, with room for two to four programs that wait for memory in turn.
TILE, NUM_WARPS = 8192, 8
# Rows of a block: 16 fp16 pixels of a channel fill a 32-byte sector, and more than 128 leave too few programs.
FEWEST_ROWS, MOST_ROWS = 16, 128
MAX_AXES = 4  # axes of a map that cannot be joined, its batch included
WIDEST = 16  # entries whose alignment the compiler can use

SMALLEST_SQUARE = tl.constexpr(NORM_EPS**2)
LARGEST_SQUARED = tl.constexpr(2.0**50)  # the squares of 512 larger entries may overflow
SHRINK = tl.constexpr(2.0**-70)  # brings all larger entries to 1e-6 .. 3e17
INF = tl.constexpr(float("inf"))

PLACES = ["stride_0", "size_1", "stride_1", "size_2", "stride_2", "size_3", "stride_3", "step"]


@triton.jit
def map_offsets(
    pixels, channels, stride_0, size_1, stride_1, size_2, stride_2, size_3, stride_3, step,
    AXES: tl.constexpr, TOGETHER: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Element offsets (int64) of a tile of a map, from flat pixel numbers and the map's axes, outermost first.

    C: the tile's axis of channels. TOGETHER: channels lie next to each other, and pixel strides count pieces of this
    many entries, so that the compiler sees their alignment; 0: channels lie `step` apart.
    """
    first = tl.zeros_like(pixels).to(tl.int64)
    if AXES > 3:
        first += (pixels % size_3) * stride_3
        pixels = pixels // size_3
    if AXES > 2:
        first += (pixels % size_2) * stride_2
        pixels = pixels // size_2
    if AXES > 1:
        first += (pixels % size_1) * stride_1
        pixels = pixels // size_1
    first += pixels * stride_0
    if TOGETHER > 0:
        offsets = tl.expand_dims(first * TOGETHER, C) + tl.expand_dims(channels, 1 - C)
    else:
        offsets = tl.expand_dims(first, C) + tl.expand_dims(channels * step, 1 - C)
    return offsets


@triton.jit
def nearest_tf32(x):
    """fp32 numbers that a matrix unit does not cut: the low 13 bits are 0, after rounding to the nearest."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)  # the bits of a NaN may all be ones, which would overflow


@triton.jit(do_not_specialize=["live", *PLACES, "num_rows"])  # live: the last element of a tensor, aligned or not
def pack_kernel(
    features, order, live, data, inverse_norm,
    stride_0: tl.int64, size_1: tl.int32, stride_1: tl.int64, size_2: tl.int32, stride_2: tl.int64,
    size_3: tl.int32, stride_3: tl.int64, step: tl.int64, num_rows: tl.int32,
    D: tl.constexpr, NORMALIZE: tl.constexpr, TF32: tl.constexpr, AXES: tl.constexpr, TOGETHER: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """data [n, D] and inverse_norm [n] of BLOCK rows of the map. Rows from `live` on are zeros, and are not read.

    TF32: matrix units will multiply the rows in it.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    alive = there & (rows < tl.load(live))
    channels = tl.arange(0, BLOCK_D)
    real = tl.expand_dims(channels < D, 1 - C)
    pixels = tl.load(order + rows, mask=alive, other=0).to(tl.int32)
    places = map_offsets(
        pixels, channels, stride_0, size_1, stride_1, size_2, stride_2, size_3, stride_3, step, AXES, TOGETHER, C
    )
    x = tl.load(features + places, mask=tl.expand_dims(alive, C) & real, other=0.0).to(tl.float32)
    inverse = alive.to(tl.float32)
    if NORMALIZE:
        shrink = tl.where(tl.max(tl.abs(x), C) > LARGEST_SQUARED, SHRINK, 1.0)
        x *= tl.expand_dims(shrink, C)
        square = tl.sum(x * x, C)
        short = square <= SMALLEST_SQUARE
        inverse = tl.where(short, 0.0, tl.rsqrt(tl.where(short, 1.0, square)))
        # An infinite row has no direction either, but it must stay visible. NaN is a literal: each launch compares the
        # globals of a kernel with those of its compilation, and NaN differs from itself.
        inverse = tl.where(square == INF, float("nan"), inverse)
        x *= tl.expand_dims(inverse, C)
        inverse *= shrink
    if TF32:
        x = nearest_tf32(x)
    at = tl.expand_dims(rows.to(tl.int64) * D, C) + tl.expand_dims(channels, 1 - C)
    tl.store(data + at, x.to(data.dtype.element_ty), mask=tl.expand_dims(there, C) & real)
    tl.store(inverse_norm + rows, inverse, mask=there)


@triton.jit(do_not_specialize=["row_stride", "channel_stride", *PLACES, "num_rows"])
def unpack_kernel(
    grad, data, inverse_norm, order, grad_features, row_stride: tl.int64, channel_stride: tl.int64,
    stride_0: tl.int64, size_1: tl.int32, stride_1: tl.int64, size_2: tl.int32, stride_2: tl.int64,
    size_3: tl.int32, stride_3: tl.int64, step: tl.int64, num_rows: tl.int32,
    D: tl.constexpr, NORMALIZE: tl.constexpr, PERMUTATION: tl.constexpr, CONTIGUOUS: tl.constexpr,
    AXES: tl.constexpr, TOGETHER: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the pixels of BLOCK rows: (grad - data <grad, data>) / norm, the projection only if normalised.

    Rows without a gradient (inverse norm 0) are written as zeros if PERMUTATION says that no other row has their
    pixels. CONTIGUOUS: the rows of `grad` are contiguous.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    inverse = tl.load(inverse_norm + rows, mask=there, other=0.0)
    alive = inverse != 0
    channels = tl.arange(0, BLOCK_D)
    real = tl.expand_dims(channels < D, 1 - C)
    at = tl.expand_dims(rows.to(tl.int64) * D, C) + tl.expand_dims(channels, 1 - C)
    if CONTIGUOUS:
        at_grad = at
    else:
        at_grad = tl.expand_dims(rows.to(tl.int64) * row_stride, C) + tl.expand_dims(channels * channel_stride, 1 - C)
    mask = tl.expand_dims(alive, C) & real
    g = tl.load(grad + at_grad, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        unit = tl.load(data + at, mask=mask, other=0.0).to(tl.float32)
        g -= unit * tl.expand_dims(tl.sum(g * unit, C), C)
    g *= tl.expand_dims(inverse, C)
    written = alive
    if PERMUTATION:
        written = there
    pixels = tl.load(order + rows, mask=written, other=0).to(tl.int32)
    places = map_offsets(
        pixels, channels, stride_0, size_1, stride_1, size_2, stride_2, size_3, stride_3, step, AXES, TOGETHER, C
    )
    tl.store(grad_features + places, g.to(grad_features.dtype.element_ty), mask=tl.expand_dims(written, C) & real)


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """fp16 for unit rows of half precision (there it is 8 times as exact as bf16), else bf16 for its range."""
    if features.dtype == torch.float64:
        raise NotImplementedError(
            "float64 needs backend 'blockwise' or 'dense', got several inputs, one of them float64"
        )
    if features.dtype == torch.float32:
        return torch.float32
    if normalize:
        return torch.float16
    # Turing's matrix unit has no bf16, and the interpreter computes it wrongly.
    no_bf16 = interpreted() or configs.capability(features.device) < 80
    return torch.float32 if no_bf16 else torch.bfloat16


def pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows `order` of the map [n, D], zero from `live` on, and the inverse norm by which each was scaled [n]."""
    dtype = rows_dtype(features, normalize)
    if len(_axes(features.shape, features.stride())) > MAX_AXES:
        features = features.contiguous()
    count, channels = order.numel(), features.shape[1]
    data = torch.empty(count, channels, dtype=dtype, device=features.device)
    inverse_norm = torch.empty(count, dtype=torch.float32, device=features.device)
    places, layout = _layout(features.shape, features.stride())
    _launch(
        pack_kernel, data, features, order.contiguous(), live, data, inverse_norm, *places, count,
        NORMALIZE=normalize, TF32=configs.precision(data) == "tf32", **layout,
    )  # fmt: skip
    return data, inverse_norm


def pack_backward(
    grad: Tensor,
    data: Tensor,
    inverse_norm: Tensor,
    order: Tensor,
    normalize: bool,
    shape: list[int],
    stride: list[int],
    dtype: torch.dtype,
    permutation: bool,
) -> Tensor:
    """Gradient of the map, written into its own layout, from the gradient of its rows."""
    grad_features = torch.empty_strided(shape, stride, dtype=dtype, device=grad.device)
    target = grad_features
    if len(_axes(shape, stride)) > MAX_AXES:
        target = torch.empty(shape, dtype=dtype, device=grad.device)
    if not permutation:
        target.zero_()
    places, layout = _layout(shape, target.stride())
    _launch(
        unpack_kernel, data, grad, data, inverse_norm, order.contiguous(), target, *grad.stride(), *places,
        order.numel(), NORMALIZE=normalize, PERMUTATION=permutation, CONTIGUOUS=grad.is_contiguous(), **layout,
    )  # fmt: skip
    return grad_features if target is grad_features else grad_features.copy_(target)


def _axes(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Size and stride of the axes [B, *S] of a map's pixels, outermost first.

    Axes with one common stride are joined.
    """
    axes: list[tuple[int, int]] = []
    for size, step in zip((shape[0], *shape[2:]), (stride[0], *stride[2:])):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * step:
            size *= axes.pop()[0]
        axes.append((size, step))
    return axes or [(1, 0)]


def _layout(shape: Sequence[int], stride: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """The places of a map's entries, as a kernel's PLACES and its constants.

    The last axis of a tile becomes the fastest axis of the threads, unless the compiler can prove that another axis is
    contiguous. It cannot where pixels come from `order`. So C makes the last axis the one whose neighbours are closer
    in the map. In channels-first maps that is the pixel axis (the order keeps neighbours in an image row together), and
    a warp then reads whole sectors of one channel. Vectors [n, D], whose channels are provably contiguous, are accessed
    along the channels anyway; the compiler turns the tile in shared memory.
    """
    axes, step = _axes(shape, stride), stride[1]
    # A constant, and no argument is specialised: the divisibility of H * W must not cause another compilation.
    together = math.gcd(WIDEST, *(pixel_step for _, pixel_step in axes)) if step == 1 else 0
    unit = max(together, 1)
    places = [axes[0][1] // unit]
    for size, pixel_step in [*axes[1:], *[(1, 0)] * (MAX_AXES - len(axes))]:
        places += size, pixel_step // unit
    return [*places, step], {
        "D": shape[1],
        "AXES": len(axes),
        "TOGETHER": together,
        "C": int(step == 1 or step < axes[-1][1]),
    }


def _launch(kernel: Any, rows: Tensor, *args: Any, **constants: Any) -> None:
    """Run one program for each block of `rows` [n, D]."""
    count, channels = rows.shape
    block_d = configs.power_of_2(channels)
    block = min(max(TILE // block_d, FEWEST_ROWS), MOST_ROWS)
    sizes = {"BLOCK": block, "BLOCK_D": block_d, "num_warps": NUM_WARPS}
    launch.run(kernel, configs.blocks_of(count, block), rows, *args, **constants, **sizes)
