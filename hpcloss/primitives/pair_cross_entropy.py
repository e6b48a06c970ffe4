"""`pair_cross_entropy`: a log-sum-exp less the positives' mean, from one S, without a difference that cancels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import differentiable_once, ops, register_on_backends
from hpcloss.plan.partition import Pairs
from hpcloss.primitives.autograd import fake_gradients, fake_statistics, inputs, needs, of_inputs
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def pair_cross_entropy(
    anchors: Rows, pairs: Pairs, scale: Scale, *, keys: Rows | None = None, hardness: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the positives' weights and the softmax over all keys: a log-sum-exp less the positives' mean.

        loss_i = -sum_{j in positives(i)} w_ij log p_ij,    p_ij = exp(scale s_ij - lse_i)
        lse_i = log sum_{j in others(i)} exp(scale s_ij),   w = softmax over the positives of (-hardness s_ij), detached

    Backward forms dS_ij = scale (p_ij - w_ij) grad_i per pair, before the one product with the keys. Near the minimum
    of a loss p and w cancel, and the gradients of two primitives, subtracted, would be rounding errors. For the same
    reason the loss is formed relative to the largest logit of a row, so that it is never negative.

    Returns (loss, lse, mass), [N] each, fp32 (float64). loss and lse are differentiable, in rows and scale, once. mass
    is the log-sum-exp of the weights, as in `pair_mean`. A row without positives has loss 0 and mass -inf. keys: as in
    `pair_lse`. Results over parts a of the keys merge, without a difference that cancels:

        lse = log sum_a exp(lse_a),    loss = sum_a share_a (loss_a + lse - lse_a),    share = softmax over a of mass_a
    """
    rows = inputs(anchors, keys, scale)
    return _PairCrossEntropy.apply(
        *rows, scale.bound, float(hardness), anchors.backend_for("pair_cross_entropy", pairs, keys), *pairs.intervals
    )


class _PairCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor | None,
        key_companion: Tensor | None,
        scale: Tensor,
        bound: float | None,
        hardness: float,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, lse, mass, shift, total = ops.pair_cross_entropy(
            anchors, keys, scale, bound, hardness, list(intervals), backend
        )
        # The loss because second derivatives must find the graph in what is saved (`differentiable_once`).
        ctx.save_for_backward(loss, mass, shift, total, anchors, keys, scale, *intervals)
        ctx.options, ctx.backend = (bound, hardness), backend
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # or zeros would be made for an lse that nobody uses
        return loss, lse, mass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, grad_mass: None) -> tuple[Tensor | None, ...]:
        _, mass, shift, total, anchors, keys, scale, *intervals = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * (8 + len(intervals))
        found = ops.pair_cross_entropy_backward(
            torch.zeros_like(mass) if grad is None else grad, grad_lse, mass, shift, total, anchors, keys, scale,
            *ctx.options, intervals, *needs(ctx), ctx.backend,
        )  # fmt: skip
        return of_inputs(ctx, found)


# The last arguments of a backward operator: three flags and the backend.
def _fake_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    mass: Tensor,
    shift: Tensor,
    total: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


register_on_backends(
    "pair_cross_entropy",
    "(Tensor anchors, Tensor? keys, Tensor scale, float? scale_bound, float hardness, Tensor[] intervals, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda anchors, *_: fake_statistics(anchors, 5),
)
register_on_backends(
    "pair_cross_entropy_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor mass, Tensor shift, Tensor total, Tensor anchors, Tensor? keys,"
    " Tensor scale, float? scale_bound, float hardness, Tensor[] intervals,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
