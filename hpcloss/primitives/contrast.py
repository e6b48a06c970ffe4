"""The contrast by labels of most losses: four denominators over one set of pairs.

The dense backend computes it in one step, from one S. The other backends compose it of the streaming primitives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hpcloss.arithmetic import softplus
from hpcloss.backends import pytorch
from hpcloss.operators import differentiable_once, ops, register_on_backends, statistics_dtype
from hpcloss.plan.partition import Pairs
from hpcloss.primitives.autograd import fake_gradients, inputs, needs, of_inputs
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def contrast(
    rows: Rows,
    pairs: Pairs,
    *,
    scale: Scale,
    keys: Rows | None = None,
    denominator: str = "own",
    hardness: float = 0.0,
    discount: float = 0.0,
    detach_weights: bool = True,
    multiplicity: int = 1,
) -> tuple[Tensor, Tensor]:
    """Loss of each anchor for one of four denominators.

        "own":        L_i = Σ_{j∈P(i)} w_ij [ log( e^{l_ij - discount · s_ij} + D_i ) - l_ij ]
        "negatives":  L_i = log D_i - Σ_{j∈P(i)} w_ij l_ij
        "all":        L_i = log( D_i + Σ_{j∈P(i)} e^{l_ij} ) - Σ_{j∈P(i)} w_ij l_ij
        "pair":       L_i = log( e^{l_ij} + D_i ) - l_ij      for anchors with at most one positive j

    D_i = Σ_{n∈N(i)} e^{l_in} is the sum over the negatives, l_ij = scale · s_ij the logit of anchor i and key j, and
    w_ij = softmax_{j∈P(i)}( -hardness · s_ij ) the weight of a positive. An anchor counts if it has a positive and, for
    "own" and "negatives", a negative.

    Args:
        rows: Packed anchors `[N, D]`.
        pairs: The keys of each anchor.
        scale: `Scale.of(temperature, rows, normalize)`.
        keys: Packed keys `[M, D]`. None: the anchors.
        denominator: "own", "negatives", "all" or "pair".
        hardness: Exponent of the weights. 0: all positives have the same weight.
        discount: Discount of a positive in its own denominator, for "own".
        detach_weights: Treat the weights as constants in the gradient.
        multiplicity: Number of times that each key stands in the denominators.

    Returns:
        The loss `[N]`, 0 where the anchor does not count, and whether it counts `[N]`.
    """
    backend = rows.backend_for("contrast", pairs, keys)
    if backend in ("dense", "pieces"):
        form = (denominator, float(hardness), float(discount), detach_weights, multiplicity)
        given, kept = inputs(rows, keys, scale), 0
        if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in given]):
            kept = pytorch.kept_slopes(pairs.intervals, (rows if keys is None else keys).data.shape[0])
        return _Contrast.apply(*given, form, torch.is_grad_enabled(), kept, backend, *pairs.intervals)
    if denominator == "pair":
        lse = pair_lse(rows, pairs, "negatives", scale, keys=keys)
        own, _ = pair_mean(rows, pairs, "logit", scale.unbounded(), keys=keys)
        counted = pairs.intervals.counted()
        return torch.where(counted, softplus(lse - own), 0.0), counted
    counted = pairs.intervals.counted(need_negatives=denominator != "all")
    if denominator == "all":
        loss = _against_all(rows, pairs, scale, keys, hardness, detach_weights)
        return loss if multiplicity == 1 else torch.where(counted, loss + math.log(multiplicity), 0.0), counted
    lse = pair_lse(rows, pairs, "negatives", scale, keys=keys)
    if denominator == "negatives":
        lse = lse + math.log(multiplicity) if multiplicity > 1 else lse
        mean, _ = pair_mean(rows, pairs, "logit", scale, keys=keys, hardness=hardness, detach_weights=detach_weights)
        return torch.where(counted, lse - mean, 0.0), counted
    if multiplicity > 1:
        lse, scale = lse + math.log(multiplicity), scale.raised(math.log(multiplicity))
    mean, _ = pair_mean(
        rows, pairs, "own", scale, keys=keys, stat=lse, hardness=hardness, discount=discount,
        detach_weights=detach_weights,
    )  # fmt: skip
    # Without a discount the mean of an uncounted anchor is 0: no positives, or log(1 + 0) without negatives.
    return torch.where(counted, mean, 0.0) if discount else mean, counted


def _against_all(
    rows: Rows, pairs: Pairs, scale: Scale, keys: Rows | None, hardness: float, detach_weights: bool
) -> Tensor:
    """The log-sum-exp less the mean of the positives [N], 0 without a positive."""
    loss, _, _ = pair_cross_entropy(rows, pairs, scale, keys=keys, hardness=hardness)
    if not hardness or detach_weights:
        return loss
    # Both means have the same value. Their gradients differ by the part that flows through the weights.
    differentiated, detached = (
        pair_mean(rows, pairs, "logit", scale, keys=keys, hardness=hardness, detach_weights=detach)[0]
        for detach in (False, True)
    )
    return loss - (differentiated - detached)


class _Contrast(torch.autograd.Function):
    """The losses of the dense backend. Forward computes the slopes of all pairs, because the similarities are there."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor | None,
        key_companion: Tensor | None,
        scale: Tensor,
        form: tuple[str, float, float, bool, int],
        differentiated: bool,
        kept: int,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needed = [differentiated and need for need in needs(ctx)]
        if backend == "pieces":  # it keeps gradients instead of slopes
            kept = sum([x.numel() for x, need in zip((anchors, keys), needed) if x is not None and need])
        loss, counted, slopes, by_scale = ops.pair_contrast(
            anchors, keys, scale, *form, list(intervals), *needed, kept, backend
        )
        # The loss is saved because a second derivative must find the graph (`differentiable_once`).
        ctx.save_for_backward(loss, slopes, by_scale, anchors, keys, scale, *intervals)
        ctx.form, ctx.backend = form, backend
        ctx.mark_non_differentiable(counted)
        ctx.set_materialize_grads(False)
        return loss, counted

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_counted: None) -> tuple[Tensor | None, ...]:
        _, slopes, by_scale, anchors, keys, scale, *intervals = ctx.saved_tensors
        if grad is None:
            return (None,) * (9 + len(intervals))
        found = ops.pair_contrast_backward(
            grad, slopes, by_scale, anchors, keys, scale, *ctx.form, intervals, *needs(ctx), ctx.backend
        )
        return of_inputs(ctx, found)


def _fake(anchors: Tensor, keys: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs_scale, kept = rest[8:10]
    loss = anchors.new_empty(anchors.shape[:1], dtype=statistics_dtype(anchors.dtype))
    by_scale = loss.new_empty(anchors.shape[0] if needs_scale else 0)
    return loss, torch.empty_like(loss, dtype=torch.bool), loss.new_empty(kept), by_scale


# The last arguments: three flags and the backend.
def _fake_backward(
    grad: Tensor, slopes: Tensor, by_scale: Tensor, anchors: Tensor, keys: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


_FORM = "str denominator, float hardness, float discount, bool detach_weights, int multiplicity, Tensor[] intervals"
register_on_backends(
    "pair_contrast",
    f"(Tensor anchors, Tensor? keys, Tensor scale, {_FORM}, bool needs_anchors, bool needs_keys,"
    " bool needs_scale, SymInt kept, str backend)"
    " -> (Tensor loss, Tensor counted, Tensor slopes, Tensor by_scale)",
    _fake,
)
register_on_backends(
    "pair_contrast_backward",
    f"(Tensor grad, Tensor slopes, Tensor by_scale, Tensor anchors, Tensor? keys, Tensor scale, {_FORM},"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
