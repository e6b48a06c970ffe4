"""`one_positive`: the logit of the only positive of each anchor and log-sum-exps of its negatives, from one S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import differentiable_once, ops, register_on_backends, statistics_dtype
from hpcloss.plan.partition import Pairs
from hpcloss.primitives.autograd import fake_gradients, inputs, needs, of_inputs
from hpcloss.primitives.pair_lse import pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def one_positive(
    anchors: Rows,
    pairs: Pairs,
    scale: Scale,
    *,
    keys: Rows | None = None,
    factors: Sequence[float] = (1.0,),
    both: bool = False,
) -> tuple[Tensor, Any]:
    """The logit of the only positive of each anchor, and a log-sum-exp over its negatives.

        own_i = scale · s_ip,      lse_i = log Σ_{j∈N(i)} exp( factor · scale · s_ij )

    p is the positive of anchor i, N(i) its negatives, s_ij = ⟨anchor_i, key_j⟩ the similarity. Both results are
    differentiable in rows and scale, once.

    Args:
        anchors: Packed anchors `[N, D]`.
        pairs: One region where every row is an anchor and has exactly one positive.
        scale: `Scale.of(temperature, anchors, normalize)`.
        keys: Packed keys `[M, D]`. None: the anchors.
        factors: Positive numbers, one log-sum-exp for each.
        both: Return the log-sum-exps of anchors over keys and of keys over anchors `[2, N]`, as `pair_lse_both`. It
            takes no factors, and pairs such as those of `one_to_one`.

    Returns:
        own `[N]` and lse `[N]`, a tuple of them for several factors. lse is -inf without gradient if there is no
            negative.
    """
    backend = anchors.backend_for("one_positive", pairs, keys)
    if backend != "triton":
        numbers = tuple([float(factor) for factor in factors])
        rows = inputs(anchors, keys, scale)
        own, lse = _OnePositive.apply(*rows, scale.bound, numbers, both, backend, *pairs.intervals)
        return own, lse.unbind() if len(numbers) > 1 else lse
    own, _ = pair_mean(anchors, pairs, "logit", scale.unbounded(), keys=keys)
    if both and keys is not None:
        return own, torch.stack(pair_lse_both(anchors, keys, pairs, "negatives", scale))
    lse = [pair_lse(anchors, pairs, "negatives", scale.times(factor), keys=keys) for factor in factors]
    return own, lse[0] if len(lse) == 1 else tuple(lse)


class _OnePositive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor | None,
        key_companion: Tensor | None,
        scale: Tensor,
        bound: float | None,
        factors: tuple[float, ...],
        both: bool,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own, lse, kept = ops.one_positive(anchors, keys, scale, bound, factors, both, list(intervals), backend)
        ctx.save_for_backward(own, lse, kept, anchors, keys, scale, *intervals)
        ctx.form, ctx.backend = (bound, factors, both), backend
        return own, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_own: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, lse, kept, anchors, keys, scale, *intervals = ctx.saved_tensors
        found = ops.one_positive_backward(
            grad_own, grad, own, lse, kept, anchors, keys, scale, *ctx.form, intervals, *needs(ctx),
            ctx.backend,
        )  # fmt: skip
        return of_inputs(ctx, found)


def _fake(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    bound: float | None,
    factors: Sequence[float],
    both: bool,
    intervals: list[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, count = statistics_dtype(anchors.dtype), anchors.shape[0]
    pairs = (count, (anchors if keys is None else keys).shape[0]) if backend == "dense" else (0, 0)
    number = 2 if both else len(factors)
    sums = (count,) if number == 1 else (number, count)
    own, lse, kept = (anchors.new_empty(shape, dtype=dtype) for shape in ((count,), sums, pairs))
    return own, lse, kept


# The last arguments: three flags and the backend.
def _fake_backward(
    grad_own: Tensor,
    grad: Tensor,
    own: Tensor,
    lse: Tensor,
    kept: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


_FORM = "Tensor anchors, Tensor? keys, Tensor scale, float? scale_bound, float[] factors, bool both, Tensor[] intervals"
register_on_backends("one_positive", f"({_FORM}, str backend) -> (Tensor own, Tensor lse, Tensor kept)", _fake)
register_on_backends(
    "one_positive_backward",
    f"(Tensor grad_own, Tensor grad, Tensor own, Tensor lse, Tensor kept, {_FORM},"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
