"""Gather the pixels of a feature map in a plan's order and normalise them: [B, D, *S] -> rows [N, D].

Gradients between the primitives and the feature map are fp32 whatever the rows' dtype. Autograd would cast them to the
rows' dtype, and in fp16 the gradient of a mean over 65 536 rows loses up to a quarter of itself, so rows are not
differentiable; a zero-stride companion of the gradient's dtype stands in for them in the graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.backends import BACKENDS
from hpcloss.ops import differentiable_once, register

# A row at most this long has no direction: it becomes the zero row and gets no gradient.
# (Dividing by a floor instead would give such a row a gradient 1e12 times too large.)
NORM_EPS = 1e-12
FEW = 4  # rows are few where the map has more than this many times as many pixels
ROWS = 1 << 12  # handled at a time in the backward pass, to keep temporaries small


class Rows(NamedTuple):
    """Packed embeddings [N, D]: primitives read `data`; their gradient flows to `companion`, which holds nothing."""

    data: Tensor
    companion: Tensor

    def detach(self) -> Rows:
        return Rows(self.data.detach(), self.companion.detach())


def pack(features: Tensor, order: Tensor, live: Tensor | None = None, *, normalize: bool, backend: str) -> Rows:
    """Rows `order` of `features` [B, D, *S] (any strides), L2-normalised if asked.

    order [n]: flat pixel indices b * prod(S) + s. live: 0-dim or [1] number of leading rows that count; the rest become
    zero rows, so that whatever an ignored pixel holds reaches nothing. Differentiable with respect to features.
    """
    if live is None:
        live = torch.full((1,), order.numel(), dtype=order.dtype, device=order.device)
    dtype = BACKENDS[backend].rows_dtype(features.dtype, normalize)
    return Rows(*_Pack.apply(features, order, live.reshape(1), normalize, dtype))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, order: Tensor, live: Tensor, normalize: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        data, inverse_norm = torch.ops.hpcloss.pack(features, order, live, normalize, dtype)
        ctx.save_for_backward(data, inverse_norm, order)
        # The layout of the gradient: that of the features, or a dense one where theirs overlaps itself.
        ctx.stride = torch.empty_like(features, device="meta").stride()
        ctx.shape, ctx.dtype, ctx.normalize = features.shape, features.dtype, normalize
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        companion = torch.zeros((), dtype=inverse_norm.dtype, device=features.device).expand(data.shape)
        return data, companion

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_data: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        data, inverse_norm, order = ctx.saved_tensors
        grad_features = torch.ops.hpcloss.pack_backward(
            grad, data, inverse_norm, order, ctx.normalize, list(ctx.shape), list(ctx.stride), ctx.dtype
        )
        return grad_features, None, None, None, None


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


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack_impl(
    features: Tensor, order: Tensor, live: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    accumulate = _norm_dtype(features.dtype)
    alive = torch.arange(order.numel(), device=order.device) < live
    rows = _gather(features, order)
    rows = rows.to(accumulate)
    # Filled, not multiplied by zero: an ignored pixel may hold inf or NaN.
    if rows.device.type == "cpu":
        rows[int(live) :].zero_()
    else:
        rows.masked_fill_(~alive[:, None], 0.0)
    if not normalize:
        return rows.to(dtype), alive.to(accumulate)
    norm = torch.linalg.vector_norm(rows, dim=1)
    if rows.device.type != "cpu" or not bool((norm < 1e15).all()):
        # The squares of a row of 1e30 overflow fp32.
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    inverse_norm = torch.where(norm <= NORM_EPS, 0.0, 1 / norm).to(accumulate)
    return rows.mul_(inverse_norm[:, None]).to(dtype), inverse_norm


def _pack_backward_impl(
    grad: Tensor,
    data: Tensor,
    inverse_norm: Tensor,
    order: Tensor,
    normalize: bool,
    shape: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
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


def _pack_fake(
    features: Tensor, order: Tensor, live: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count, channels = order.numel(), features.shape[1]
    return (
        features.new_empty((count, channels), dtype=dtype),
        features.new_empty((count,), dtype=_norm_dtype(features.dtype)),
    )


def _pack_backward_fake(
    grad: Tensor,
    data: Tensor,
    inverse_norm: Tensor,
    order: Tensor,
    normalize: bool,
    shape: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=grad.device)


register(
    "pack",
    "(Tensor features, Tensor order, Tensor live, bool normalize, ScalarType dtype) -> (Tensor, Tensor)",
    _pack_impl,
    _pack_fake,
)
register(
    "pack_backward",
    "(Tensor grad, Tensor data, Tensor inverse_norm, Tensor order, bool normalize, SymInt[] shape, SymInt[] stride,"
    " ScalarType dtype) -> Tensor",
    _pack_backward_impl,
    _pack_backward_fake,
)
