"""Packing as PyTorch operations: any device, float32 and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.backends import library
from hpcloss.operators import NORM_EPS, statistics_dtype
from hpcloss.plan import native

FEW = 4  # rows are few if the map has more than this many times as many pixels
LARGE = 1e15  # the squares of a row of 1e30 overflow fp32
FEW_NUMBERS = 1 << 17  # elements of a map; up to here strided reads per pixel are no slower than a transpose
ROWS = 1 << 12  # rows at a time in the backward pass, to keep temporaries small


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """Dtype of packed rows for this backend."""
    return statistics_dtype(features.dtype)


def _by_pixel(features: Tensor) -> Tensor:
    """[B, D, *S] as [B, S, D], without a copy if the spatial axes can be joined."""
    return (features.unsqueeze(-1) if features.dim() == 2 else features.flatten(2)).transpose(1, 2)


def _gather(features: Tensor, order: Tensor) -> Tensor:
    """Rows `order` of the map, always a new tensor."""
    if features.dim() == 2:
        return features.index_select(0, order)
    by_pixel = _by_pixel(features)
    batch, pixels, channels = by_pixel.shape
    if order.numel() * FEW < batch * pixels:
        return by_pixel[order // pixels, order % pixels]
    # With most pixels a transpose is cheaper than strided reads, and image by image it is cheapest.
    if not by_pixel.is_contiguous() and features.device.type == "cpu":
        together = features.new_empty(batch, pixels, channels)
        for image, target in zip(by_pixel, together):
            target.copy_(image)
        by_pixel = together
    return by_pixel.reshape(batch * pixels, channels).index_select(0, order)


def pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows `order` of the map, zero from `live` on, and the inverse norm by which each was multiplied."""
    strides = _native_strides(features)
    if strides is not None:
        return library.pack(features, strides, order.contiguous(), int(live), normalize)
    rows = _gather(features, order).to(statistics_dtype(features.dtype))
    # Filled, not multiplied by zero: an ignored pixel may hold inf or NaN.
    on_host = rows.device.type == "cpu"
    if not on_host:
        rows.masked_fill_(torch.arange(order.numel(), device=order.device)[:, None] >= live, 0.0)
    elif (first := int(live)) < order.numel():
        rows[first:].zero_()
    if not normalize:
        return rows, (torch.arange(order.numel(), device=order.device) < live).to(rows.dtype)
    norm = torch.linalg.vector_norm(rows, dim=1)
    if on_host and norm.numel():
        smallest, largest = (float(bound) for bound in norm.aminmax())
        if smallest > NORM_EPS and largest < LARGE:
            inverse_norm = norm.reciprocal_()
            return rows.mul_(inverse_norm[:, None]), inverse_norm
    if not on_host or not bool((norm < LARGE).all()):
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    inverse_norm = torch.where(norm <= NORM_EPS, 0.0, 1 / norm).to(rows.dtype)
    return rows.mul_(inverse_norm[:, None]), inverse_norm


def _native_strides(features: Tensor) -> library.Strides | None:
    """Strides between images, pixels and channels, if the native library packs these features.

    They must be fp32 on the CPU and dense in memory, with channels last, or first if there are few.
    """
    if features.dtype != torch.float32 or features.device.type != "cpu" or not native.serves(features):
        return None
    channels = features.shape[1]
    pixels = features.numel() // max(features.shape[0] * channels, 1)
    if features.dim() == 2 and features.is_contiguous():
        return channels, 1, 1
    if features.is_contiguous():
        return (channels * pixels, 1, pixels) if features.numel() <= FEW_NUMBERS else None
    return (channels * pixels, channels, 1) if features.movedim(1, -1).is_contiguous() else None


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
    """Gradient of the map in its own layout, from the gradient of its rows."""
    if permutation and dtype == grad.dtype and data.dtype == dtype:
        gradient = torch.empty_strided(shape, stride, dtype=dtype, device=grad.device)
        strides = _native_strides(gradient)
        if strides is not None:
            library.unpack(grad.contiguous(), data, inverse_norm, order.contiguous(), normalize, strides, gradient)
            return gradient
    few = order.numel() * FEW < shape[0] * math.prod(shape[2:])
    # Few rows are added in place. Many rows are added in a buffer, which is then copied into the layout.
    layout = [shape[0], *shape[1:]] if few else [shape[0], *shape[2:], shape[1]]
    out = torch.zeros(layout, dtype=inverse_norm.dtype, device=grad.device)
    grad_features = out if few else out.movedim(-1, 1)
    by_pixel = _by_pixel(grad_features)
    for first in range(0, order.numel(), ROWS):
        part = slice(first, first + ROWS)
        rows = _of_rows(grad[part], data[part], inverse_norm[part], normalize)
        # Rows are added, not copied, because dead rows of a sample repeat pixel 0 with gradient 0.
        if few:
            pixels = by_pixel.shape[1]
            by_pixel.index_put_((order[part] // pixels, order[part] % pixels), rows, accumulate=True)
        else:
            out.view(-1, shape[1]).index_add_(0, order[part], rows)
    if grad_features.dtype == dtype and list(grad_features.stride()) == list(stride):
        return grad_features
    return torch.empty_strided(shape, stride, dtype=dtype, device=grad.device).copy_(grad_features)


def _of_rows(grad: Tensor, unit: Tensor, inverse_norm: Tensor, normalize: bool) -> Tensor:
    """The gradient of rows before normalisation, 0 for dead rows."""
    grad = grad.to(inverse_norm.dtype)
    if normalize:
        unit = unit.to(grad.dtype)
        grad = torch.addcmul(grad, unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1)
    return grad * inverse_norm[:, None]
