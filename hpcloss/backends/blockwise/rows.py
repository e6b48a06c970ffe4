"""Packing as PyTorch operations: any device, float32 and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.operators import NORM_EPS, statistics_dtype

FEW = 4  # rows are few where the map has more than this many times as many pixels
ROWS = 1 << 12  # handled at a time in the backward pass, to keep temporaries small


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """Dtype in which features are packed for this backend."""
    return statistics_dtype(features.dtype)


def _by_pixel(features: Tensor) -> Tensor:
    """[B, D, *S] as [B, S, D] without a copy where the spatial axes can be joined."""
    return (features.unsqueeze(-1) if features.dim() == 2 else features.flatten(2)).transpose(1, 2)


def _gather(features: Tensor, order: Tensor) -> Tensor:
    """Rows `order` of the map, always a new tensor."""
    by_pixel = _by_pixel(features)
    batch, pixels, channels = by_pixel.shape
    if order.numel() * FEW < batch * pixels:
        return by_pixel[order // pixels, order % pixels]
    # Most pixels: one pass that brings channels together is cheaper than strided reads, and image by image cheapest.
    if not by_pixel.is_contiguous() and features.device.type == "cpu":
        together = features.new_empty(batch, pixels, channels)
        for image, target in zip(by_pixel, together):
            target.copy_(image)
        by_pixel = together
    return by_pixel.reshape(batch * pixels, channels).index_select(0, order)


def pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows `order` of the map, those from `live` on zero, and the inverse norm by which each was multiplied."""
    accumulate = statistics_dtype(features.dtype)
    alive = torch.arange(order.numel(), device=order.device) < live
    rows = _gather(features, order)
    rows = rows.to(accumulate)
    # Filled, not multiplied by zero: an ignored pixel may hold inf or NaN.
    if rows.device.type == "cpu":
        rows[int(live) :].zero_()
    else:
        rows.masked_fill_(~alive[:, None], 0.0)
    if not normalize:
        return rows, alive.to(accumulate)
    norm = torch.linalg.vector_norm(rows, dim=1)
    if rows.device.type != "cpu" or not bool((norm < 1e15).all()):
        # The squares of a row of 1e30 overflow fp32.
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    inverse_norm = torch.where(norm <= NORM_EPS, 0.0, 1 / norm).to(accumulate)
    return rows.mul_(inverse_norm[:, None]), inverse_norm


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
    few = order.numel() * FEW < shape[0] * math.prod(shape[2:])
    # Few rows are added where they belong; most rows next to each other, to be brought into the layout at the end.
    layout = [shape[0], *shape[1:]] if few else [shape[0], *shape[2:], shape[1]]
    out = torch.zeros(layout, dtype=inverse_norm.dtype, device=grad.device)
    grad_features = out if few else out.movedim(-1, 1)
    by_pixel = _by_pixel(grad_features)
    for first in range(0, order.numel(), ROWS):
        part = slice(first, first + ROWS)
        rows = grad[part].to(out.dtype)
        if normalize:
            unit = data[part].to(out.dtype)
            rows = torch.addcmul(rows, unit, (rows * unit).sum(1, keepdim=True), value=-1)
        rows = rows * inverse_norm[part, None]
        # Dead rows of a sample repeat pixel 0 with gradient 0, so rows are added, not copied.
        if few:
            pixels = by_pixel.shape[1]
            by_pixel.index_put_((order[part] // pixels, order[part] % pixels), rows, accumulate=True)
        else:
            out.view(-1, shape[1]).index_add_(0, order[part], rows)
    if grad_features.dtype == dtype and list(grad_features.stride()) == list(stride):
        return grad_features
    return torch.empty_strided(shape, stride, dtype=dtype, device=grad.device).copy_(grad_features)
