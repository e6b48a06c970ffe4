"""`pair_lse`: log-sum-exps of similarities of packed rows. `pair_lse_both`: those of the rows and columns of one S."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import differentiable_once, ops, register_on_backends
from hpcloss.plan.partition import Pairs
from hpcloss.primitives.autograd import fake_gradients, fake_statistics, inputs, needs, of_inputs
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale

RULES = ("positives", "negatives", "others", "every")


def pair_lse(
    anchors: Rows, pairs: Pairs, rule: str, scale: Scale, *, keys: Rows | None = None, bias: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of the similarities of each anchor and some of its keys.

        lse_i = log Σ_{j∈rule(i)} exp( scale · s_ij + bias_j )

    s_ij = ⟨anchor_i, key_j⟩ is the similarity. The result is differentiable in rows and scale, once. Results over parts
    of the keys merge by `torch.logaddexp`.

    Args:
        anchors: Packed anchors `[N, D]`.
        pairs: The keys of each anchor.
        rule: "positives", "negatives", "others" (both, never the anchor itself) or "every" (all keys of the region).
        scale: `Scale.of(temperature, anchors, normalize)`.
        keys: Packed keys `[M, D]`. None: the anchors; one backward pass then serves both sides of a pair.
        bias: Logarithm of the multiplicity of each key `[M]`, without gradient. None: 0.

    Returns:
        lse `[N]`, fp32 (float64 for float64 rows). -inf without gradient if no key fits the rule, or if a row is no
            anchor.

    Raises:
        ValueError: Anchors and keys are packed for different backends.
        NotImplementedError: The backend cannot run the call.

    Examples:
        >>> import torch
        >>> from hpcloss.plan.partition import partition
        >>> from hpcloss.primitives.pair_lse import pair_lse
        >>> from hpcloss.primitives.rows import pack
        >>> from hpcloss.primitives.scale import Scale
        >>> pairs = partition(torch.tensor([0, 0, 1]))
        >>> rows = pack(torch.eye(3), pairs.order, normalize=True)
        >>> pair_lse(rows, pairs, "negatives", Scale.of(0.1, rows, normalize=True))  # log 1, log 1, log 2
        tensor([0.0000, 0.0000, 0.6931])
    """
    rows = inputs(anchors, keys, scale)
    backend = anchors.backend_for("pair_lse", pairs, keys)
    return _PairLse.apply(*rows, bias, scale.bound, rule, backend, *pairs.intervals)


class _PairLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor | None,
        key_companion: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        bound: float | None,
        rule: str,
        backend: str,
        *intervals: Tensor,
    ) -> Tensor:
        lse = ops.pair_lse(anchors, keys, bias, scale, bound, list(intervals), rule, backend)
        ctx.save_for_backward(lse, anchors, keys, bias, scale, *intervals)
        ctx.bound, ctx.rule, ctx.backend = bound, rule, backend
        return lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, anchors, keys, bias, scale, *intervals = ctx.saved_tensors
        found = ops.pair_lse_backward(
            grad, lse, anchors, keys, bias, scale, ctx.bound, intervals, ctx.rule, *needs(ctx), ctx.backend
        )
        return of_inputs(ctx, found)


def pair_lse_both(anchors: Rows, keys: Rows, pairs: Pairs, rule: str, scale: Scale) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows and of the columns of one similarity matrix, for two-sided losses.

        rows_i = log Σ_j exp( scale · s_ij )  over the keys j of anchor i
        columns_j = log Σ_i exp( scale · s_ij )  over the anchors i of key j

    Each is `pair_lse` of one direction. One backward pass serves both. Regions must not share keys.

    Args:
        anchors: Packed anchors `[N, D]`.
        keys: Packed keys `[M, D]`.
        pairs: The keys of each anchor.
        rule: "every" or "negatives". "negatives" needs pairs that are their own inverse, with N = M: the positives of
            key j are the anchors whose numbers are in the positive interval of anchor j, as in `one_to_one`.
        scale: As for `pair_lse`.

    Returns:
        rows `[N]` and columns `[M]`, fp32 (float64 for float64 rows).

    Raises:
        ValueError: The rule is another one, or N and M differ for "negatives".
        NotImplementedError: The backend cannot run the call.
    """
    if rule not in ("every", "negatives"):
        raise ValueError(f"rule must be 'every' or 'negatives', got {rule!r}")
    if rule == "negatives" and anchors.data.shape[0] != keys.data.shape[0]:
        raise ValueError(
            f"keys must be as many as anchors with rule 'negatives', got {keys.data.shape[0]} and"
            f" {anchors.data.shape[0]}"
        )
    rows = inputs(anchors, keys, scale)
    backend = anchors.backend_for("pair_lse_both", pairs, keys)
    return _PairLseBoth.apply(*rows, scale.bound, rule, backend, *pairs.intervals)


class _PairLseBoth(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor,
        key_companion: Tensor,
        scale: Tensor,
        bound: float | None,
        rule: str,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, columns = ops.pair_lse_both(anchors, keys, scale, bound, list(intervals), rule, backend)
        ctx.save_for_backward(rows, columns, anchors, keys, scale, *intervals)
        ctx.bound, ctx.rule, ctx.backend = bound, rule, backend
        return rows, columns

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, anchors, keys, scale, *intervals = ctx.saved_tensors
        found = ops.pair_lse_both_backward(
            grad_rows, grad_columns, rows, columns, anchors, keys, scale, ctx.bound, intervals, ctx.rule, *needs(ctx),
            ctx.backend,
        )  # fmt: skip
        return of_inputs(ctx, found)


def _fake_both(anchors: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_statistics(anchors, 1) + fake_statistics(keys.to(anchors.dtype), 1)


# The last arguments of a backward operator: three flags and the backend.
def _fake_backward(grad: Tensor, lse: Tensor, anchors: Tensor, keys: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


def _fake_both_backward(
    grad_rows: Tensor, grad_columns: Tensor, rows: Tensor, columns: Tensor, anchors: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


register_on_backends(
    "pair_lse",
    "(Tensor anchors, Tensor? keys, Tensor? bias, Tensor scale, float? scale_bound, Tensor[] intervals, str rule,"
    " str backend) -> Tensor",
    lambda anchors, *_: fake_statistics(anchors, 1)[0],
)
register_on_backends(
    "pair_lse_backward",
    "(Tensor grad, Tensor lse, Tensor anchors, Tensor? keys, Tensor? bias, Tensor scale, float? scale_bound,"
    " Tensor[] intervals, str rule,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
register_on_backends(
    "pair_lse_both",
    "(Tensor anchors, Tensor keys, Tensor scale, float? scale_bound, Tensor[] intervals, str rule, str backend)"
    " -> (Tensor, Tensor)",
    _fake_both,
)
register_on_backends(
    "pair_lse_both_backward",
    "(Tensor grad_rows, Tensor grad_columns, Tensor rows, Tensor columns, Tensor anchors, Tensor keys, Tensor scale,"
    " float? scale_bound, Tensor[] intervals, str rule, bool needs_anchors, bool needs_keys, bool needs_scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_both_backward,
)
