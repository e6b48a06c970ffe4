"""`pair_lse`: log-sum-exps of the similarities of packed rows; `pair_lse_both`, of one S along rows and columns."""

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
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j), with s_ij = <anchor_i, key_j>. [N], fp32 (float64).

    rule: "positives", "negatives", "others" (both; never the anchor itself) or "every" (all keys of the region).
    keys: by default the anchors themselves; then one backward pass serves both sides of every pair. bias [M]:
    log-multiplicity of each key, not differentiable.

    An empty set, and a row that is no anchor, gives -inf and no gradient. Results over parts of the keys merge by
    logaddexp. Differentiable in rows and scale, once.
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
    """Row and column log-sum-exp of one S, for two-sided losses.

    rows_i = log sum_j exp(scale s_ij) over the keys that anchor i may meet [N], columns_j = log sum_i exp(scale s_ij)
    over the anchors that may meet key j [M]. Each is `pair_lse` of one direction; but the backward pass serves both
    with one sweep for the anchors and one for the keys. Regions must not share keys.

    rule: "every", or "negatives". "negatives" needs pairs that are their own inverse (N = M): the positives of key j
    are the anchors whose numbers lie in the interval of anchor j, as in `one_to_one`. ValueError for other rules, and
    where N and M differ.
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
