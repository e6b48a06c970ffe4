"""`pair_cross_entropy`: a log-sum-exp less the positives' mean, from one S, without cancellation."""

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

        loss_i = -Σ_{j∈P(i)} w_ij log p_ij,      p_ij = exp( scale · s_ij - lse_i )
        lse_i = log Σ_{j∈others(i)} exp( scale · s_ij ),      w_ij = softmax_{j∈P(i)}( -hardness · s_ij )

    P(i) are the positives of anchor i, others(i) its positives and negatives. s_ij = ⟨anchor_i, key_j⟩ is the
    similarity. The weights have no gradient. loss and lse are differentiable in rows and scale, once.

    The loss is exact near its minimum. There p and w cancel. So backward computes dS_ij = scale (p_ij - w_ij) grad_i
    per pair, and forward computes the loss relative to the largest logit of a row, so it is never negative.

    Results over parts a of the keys merge without cancellation:

        lse = log Σ_a exp( lse_a ),      loss = Σ_a share_a ( loss_a + lse - lse_a ),      share = softmax_a( mass_a )

    Args:
        anchors: Packed anchors `[N, D]`.
        pairs: The keys of each anchor.
        scale: `Scale.of(temperature, anchors, normalize)`.
        keys: Packed keys `[M, D]`. None: the anchors.
        hardness: Exponent of the weights. 0: all positives have the same weight. Positive: dissimilar positives weigh
            more.

    Returns:
        loss, lse and mass, `[N]` each, fp32 (float64 for float64 rows). mass is the log-sum-exp of the weights'
            exponents, without gradient. Without positives loss is 0 and mass is -inf.

    Raises:
        ValueError: Anchors and keys are packed for different backends.
        NotImplementedError: The backend cannot run the call.

    Examples:
        >>> import torch
        >>> from hpcloss.plan.partition import partition
        >>> from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
        >>> from hpcloss.primitives.rows import pack
        >>> from hpcloss.primitives.scale import Scale
        >>> pairs = partition(torch.tensor([0, 0, 1]))
        >>> rows = pack(torch.eye(3), pairs.order, normalize=True)
        >>> pair_cross_entropy(rows, pairs, Scale.of(0.1, rows, normalize=True))[0]  # log 2 twice, and no positive
        tensor([0.6931, 0.6931, 0.0000])
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
        # The loss is saved because a second derivative must find the graph (`differentiable_once`).
        ctx.save_for_backward(loss, mass, shift, total, anchors, keys, scale, *intervals)
        ctx.options, ctx.backend = (bound, hardness), backend
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # no zeros for an unused lse
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
