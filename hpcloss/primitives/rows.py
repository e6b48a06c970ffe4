"""Gather the pixels of a feature map in a plan's order and normalise them: [B, D, *S] -> rows [N, D].

Gradients between the primitives and the feature map are fp32 whatever the rows' dtype. Autograd would cast them to the
rows' dtype, and in fp16 the gradient of a mean over 65 536 rows loses up to a quarter of itself, so rows are not
differentiable; a zero-stride companion of the gradient's dtype stands in for them in the graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.backends import pytorch, resolve
from hpcloss.operators import differentiable_once, load, ops, plain, register_on_backends, statistics_dtype
from hpcloss.plan.partition import Pairs


class Rows(NamedTuple):
    """Packed embeddings [N, D].

    data: what the primitives read. companion: what their gradient flows to, of the same shape; it holds nothing.
    backend: the name of the one that packed them, which also computes what is made of them; "pytorch" where that is
    the dense one or the tiles, as suits each call.
    """

    data: Tensor
    companion: Tensor
    backend: str

    def backend_for(self, primitive: str, pairs: Pairs, keys: Rows | None) -> str:
        """The backend of a primitive over these pairs. NotImplementedError where the one that was asked for cannot."""
        if self.backend == "pytorch":
            return pytorch.choose(primitive, self.data, None if keys is None else keys.data, pairs.intervals)
        if self.backend == "dense":
            pytorch.check_dense(pairs.intervals, (self if keys is None else keys).data.shape[0])
        return self.backend

    def detach(self) -> Rows:
        """The same rows without gradient."""
        return Rows(self.data.detach(), self.companion.detach(), self.backend)

    def view(self) -> Rows:
        """The same rows as other tensors: compilers want no tensor twice among the inputs of a primitive."""
        return Rows(self.data.view_as(self.data), self.companion.view_as(self.companion), self.backend)


def pack(
    features: Tensor,
    order: Tensor,
    live: Tensor | None = None,
    *,
    normalize: bool,
    permutation: bool = False,
    backend: str = "auto",
) -> Rows:
    """Rows `order` of `features` [B, D, *S] (any strides), L2-normalised if asked.

    order [n]: flat pixel indices b * prod(S) + s, no pixel twice among the live rows. live: 0-dim or [1] number of
    leading rows that count; the rest become zero rows, so that whatever an ignored pixel holds reaches nothing.
    permutation: `order` is known to name every pixel once; then the gradient is written in one pass. backend: the
    public option of the losses. Differentiable with respect to features, once. NotImplementedError where the backend
    cannot run this call.
    """
    backend = resolve(backend, features)
    if live is None:
        live = torch.full((1,), order.numel(), dtype=order.dtype, device=order.device)
    data, companion = _Pack.apply(plain(features), order, live.reshape(1), normalize, permutation, backend)
    return Rows(data, companion, backend)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, order: Tensor, live: Tensor, normalize: bool, permutation: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        data, inverse_norm = ops.pack(features, order, live, normalize, backend)
        ctx.save_for_backward(data, inverse_norm, order)
        # The layout of the gradient: that of the features, or a dense one where theirs overlaps itself.
        dense = features if features.is_contiguous() else torch.empty_like(features, device="meta")
        ctx.stride = dense.stride()
        ctx.shape, ctx.dtype, ctx.normalize = features.shape, features.dtype, normalize
        ctx.permutation, ctx.backend = permutation, backend
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        # Nobody reads its value, so it is not even filled.
        companion = inverse_norm.new_empty_strided(data.shape, (0, 0))
        return data, companion

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_data: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        data, inverse_norm, order = ctx.saved_tensors
        grad_features = ops.pack_backward(
            grad, data, inverse_norm, order, ctx.normalize, list(ctx.shape), list(ctx.stride), ctx.dtype,
            ctx.permutation, ctx.backend,
        )  # fmt: skip
        return grad_features, None, None, None, None, None


def _fake_pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    count, channels = order.numel(), features.shape[1]
    return (
        features.new_empty((count, channels), dtype=load(backend).rows_dtype(features, normalize)),
        features.new_empty((count,), dtype=statistics_dtype(features.dtype)),
    )


def _fake_pack_backward(
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


register_on_backends(
    "pack",
    "(Tensor features, Tensor order, Tensor live, bool normalize, str backend) -> (Tensor, Tensor)",
    _fake_pack,
)
register_on_backends(
    "pack_backward",
    "(Tensor grad, Tensor data, Tensor inverse_norm, Tensor order, bool normalize, SymInt[] shape, SymInt[] stride,"
    " ScalarType dtype, bool permutation, str backend) -> Tensor",
    _fake_pack_backward,
)
