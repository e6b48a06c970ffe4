"""Packing: pixels of a feature map `[B, D, *S]`, gathered in the order of a plan and normalised, as rows `[N, D]`.

Gradients between the primitives and the feature map are fp32, whatever the dtype of the rows. Autograd would cast them
to the dtype of the rows; in fp16 the gradient of a mean over 65,536 rows then loses up to a quarter of its value. So
the rows are not differentiable. A companion tensor with the dtype of the gradient and stride 0 replaces them in the
graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.backends import pytorch, resolve
from hpcloss.operators import differentiable_once, load, ops, plain, register_on_backends, statistics_dtype
from hpcloss.plan.partition import Pairs


class Rows(NamedTuple):
    """Packed embeddings `[N, D]`, as `pack` gives them.

    Attributes:
        data: The rows that the primitives read.
        companion: The tensor that receives their gradient, with the same shape. Its values are not used.
        backend: Name of the backend that packed them and computes the primitives on them. "pytorch": the dense backend
            or the tiles, chosen for each call.
    """

    data: Tensor
    companion: Tensor
    backend: str

    def backend_for(self, primitive: str, pairs: Pairs, keys: Rows | None) -> str:
        """The backend of a primitive over these pairs.

        Args:
            primitive: Name of the primitive.
            pairs: The pairs.
            keys: The keys. None: these rows.

        Raises:
            NotImplementedError: The named backend cannot run the call.
        """
        if self.backend == "pytorch":
            return pytorch.choose(primitive, self.data, None if keys is None else keys.data, pairs.intervals)
        if self.backend == "dense":
            pytorch.check_dense(pairs.intervals, (self if keys is None else keys).data.shape[0])
        return self.backend

    def detach(self) -> Rows:
        """The same rows without gradient."""
        return Rows(self.data.detach(), self.companion.detach(), self.backend)

    def view(self) -> Rows:
        """The same rows as other tensors. Compilers want no tensor twice among the inputs of a primitive."""
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
    """Gather pixels of a feature map and normalise them.

    The result is differentiable with respect to `features`, once.

    Args:
        features: `[B, D, *S]`, or vectors `[N, D]`; any float dtype and strides.
        order: Flat pixel indices b * prod(S) + s of the rows [n]. No pixel is twice among the live rows.
        live: Number of leading rows that count, a tensor of shape [] or `[1]`. The others become zero rows, so the
            values of ignored pixels reach nothing. None: all rows count.
        normalize: Divide each row by its L2 norm. Rows with a norm of at most 1e-12 become zero and get no gradient.
        permutation: `order` names every pixel once. The gradient is then written in one pass.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton".

    Returns:
        The packed rows `[n, D]`.

    Raises:
        NotImplementedError: The backend cannot run the call.

    Examples:
        >>> import torch
        >>> from hpcloss.primitives.rows import pack
        >>> rows = pack(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 0]), normalize=True)
        >>> rows.data
        tensor([[0.0000, 1.0000],
                [0.6000, 0.8000]])
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
        # The gradient has the layout of the features, or a dense one if theirs overlaps itself.
        dense = features if features.is_contiguous() else torch.empty_like(features, device="meta")
        ctx.stride = dense.stride()
        ctx.shape, ctx.dtype, ctx.normalize = features.shape, features.dtype, normalize
        ctx.permutation, ctx.backend = permutation, backend
        ctx.mark_non_differentiable(data)
        ctx.set_materialize_grads(False)
        # Its values are not read, so it is not filled.
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
