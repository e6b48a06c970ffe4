"""Gather the pixels of a feature map in a plan's order and normalise them: [B, D, *S] -> rows [N, D].

Gradients between the primitives and the feature map are fp32 whatever the rows' dtype. Autograd would cast them to the
rows' dtype, and in fp16 the gradient of a mean over 65 536 rows loses up to a quarter of itself, so rows are not
differentiable; a zero-stride companion of the gradient's dtype stands in for them in the graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.backends import load
from hpcloss.ops import differentiable_once, plain, register, statistics_dtype


class Rows(NamedTuple):
    """Packed embeddings [N, D]: primitives read `data`; their gradient flows to `companion`, which holds nothing."""

    data: Tensor
    companion: Tensor

    def detach(self) -> Rows:
        return Rows(self.data.detach(), self.companion.detach())


def pack(
    features: Tensor,
    order: Tensor,
    live: Tensor | None = None,
    *,
    normalize: bool,
    permutation: bool = False,
    backend: str,
) -> Rows:
    """Rows `order` of `features` [B, D, *S] (any strides), L2-normalised if asked.

    order [n]: flat pixel indices b * prod(S) + s, no pixel twice among the live rows. live: 0-dim or [1] number of
    leading rows that count; the rest become zero rows, so that whatever an ignored pixel holds reaches nothing.
    permutation: `order` is known to name every pixel once; then the gradient is written in one pass. Differentiable
    with respect to features.
    """
    if live is None:
        live = torch.full((1,), order.numel(), dtype=order.dtype, device=order.device)
    return Rows(*_Pack.apply(plain(features), order, live.reshape(1), normalize, permutation, backend))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, order: Tensor, live: Tensor, normalize: bool, permutation: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        data, inverse_norm = torch.ops.hpcloss.pack(features, order, live, normalize, backend)
        ctx.save_for_backward(data, inverse_norm, order)
        # The layout of the gradient: that of the features, or a dense one where theirs overlaps itself.
        ctx.stride = torch.empty_like(features, device="meta").stride()
        ctx.shape, ctx.dtype, ctx.normalize = features.shape, features.dtype, normalize
        ctx.permutation, ctx.backend = permutation, backend
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        # Nobody reads its value, so it is not even filled.
        companion = torch.empty((), dtype=inverse_norm.dtype, device=features.device).expand(data.shape)
        return data, companion

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_data: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        data, inverse_norm, order = ctx.saved_tensors
        grad_features = torch.ops.hpcloss.pack_backward(
            grad,
            data,
            inverse_norm,
            order,
            ctx.normalize,
            list(ctx.shape),
            list(ctx.stride),
            ctx.dtype,
            ctx.permutation,
            ctx.backend,
        )
        return grad_features, None, None, None, None, None


def _pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    return load(backend).pack(features, order, live, normalize)


def _pack_backward(grad: Tensor, *args: Any) -> Tensor:
    return load(args[-1]).pack_backward(grad, *args[:-1])  # the last is the backend


def _pack_fake(features: Tensor, order: Tensor, live: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    count, channels = order.numel(), features.shape[1]
    return (
        features.new_empty((count, channels), dtype=load(backend).rows_dtype(features, normalize)),
        features.new_empty((count,), dtype=statistics_dtype(features.dtype)),
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
    permutation: bool,
    backend: str,
) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=grad.device)


register(
    "pack",
    "(Tensor features, Tensor order, Tensor live, bool normalize, str backend) -> (Tensor, Tensor)",
    _pack,
    _pack_fake,
)
register(
    "pack_backward",
    "(Tensor grad, Tensor data, Tensor inverse_norm, Tensor order, bool normalize, SymInt[] shape, SymInt[] stride,"
    " ScalarType dtype, bool permutation, str backend) -> Tensor",
    _pack_backward,
    _pack_backward_fake,
)
