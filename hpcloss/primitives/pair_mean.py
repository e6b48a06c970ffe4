"""`pair_mean`: weighted means over the positives of packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import differentiable_once, ops, register_on_backends
from hpcloss.plan.partition import Pairs
from hpcloss.primitives.autograd import fake_gradients, fake_statistics, inputs, needs, of_inputs
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def pair_mean(
    anchors: Rows,
    pairs: Pairs,
    term: str,
    scale: Scale,
    *,
    keys: Rows | None = None,
    stat: Tensor | None = None,
    hardness: float = 0.0,
    log_weight: Tensor | None = None,
    discount: float = 0.0,
    detach_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """out_i = sum_{j in positives(i)} w_ij t_ij, w = softmax over the positives of (-hardness s_ij + log_weight_j).

    term "logit": t = scale s.  term "own": t = softplus(stat_i - (scale - discount) s) - discount s, the cross-entropy
    of a positive against its own denominator e^{(scale - discount) s} + e^{stat_i}. keys: as in `pair_lse`.

    Returns (out, mass), [N] each; mass is the log-sum-exp of the weights, not differentiable: results over parts of the
    keys merge by their masses. An empty set gives out 0 and mass -inf. Differentiable in rows, scale and stat, once;
    through the weights only with `detach_weights=False`.

    A bounded scale also bounds |stat|: it must not exceed a log-sum-exp over as many keys, scale.bound + log(M), or be
    -inf. ValueError unless `stat` is given for "own" and for "own" alone.
    """
    if (term == "own") != (stat is not None):
        rule, found = ("a tensor", "None") if stat is None else ("None", "a tensor")
        raise ValueError(f"stat must be {rule} with term {term!r}, got {found}")
    return _PairMean.apply(
        *inputs(anchors, keys, scale), stat, log_weight, scale.bound, float(hardness), float(discount), detach_weights,
        anchors.backend_for("pair_mean", pairs, keys), *pairs.intervals,
    )  # fmt: skip


class _PairMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_companion: Tensor,
        keys: Tensor | None,
        key_companion: Tensor | None,
        scale: Tensor,
        stat: Tensor | None,
        log_weight: Tensor | None,
        bound: float | None,
        hardness: float,
        discount: float,
        detach_weights: bool,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, mass, slope = ops.pair_mean(
            anchors, keys, stat, log_weight, scale, bound, hardness, discount, list(intervals), backend
        )
        ctx.save_for_backward(out, mass, slope, anchors, keys, stat, log_weight, scale, *intervals)
        ctx.options, ctx.backend = (bound, hardness, discount, detach_weights), backend
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # or zeros would be made for the mass
        return out, mass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_mass: None) -> tuple[Tensor | None, ...]:
        out, mass, slope, anchors, keys, stat, log_weight, scale, *intervals = ctx.saved_tensors
        if grad is None:
            return (None,) * (12 + len(intervals))
        found: tuple[Tensor | None, ...] = (None, None, None)
        if any(needs(ctx)):
            found = ops.pair_mean_backward(
                grad, out, mass, anchors, keys, stat, log_weight, scale, *ctx.options, intervals, *needs(ctx),
                ctx.backend,
            )  # fmt: skip
        return of_inputs(ctx, found, grad * slope if ctx.needs_input_grad[5] else None)


# The last arguments of a backward operator: three flags and the backend.
def _fake_backward(
    grad: Tensor, out: Tensor, mass: Tensor, anchors: Tensor, keys: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(anchors, keys, *rest[-4:-2])


register_on_backends(
    "pair_mean",
    "(Tensor anchors, Tensor? keys, Tensor? stat, Tensor? log_weight, Tensor scale, float? scale_bound,"
    " float hardness, float discount, Tensor[] intervals, str backend) -> (Tensor, Tensor, Tensor)",
    lambda anchors, *_: fake_statistics(anchors, 3),
)
register_on_backends(
    "pair_mean_backward",
    "(Tensor grad, Tensor out, Tensor mass, Tensor anchors, Tensor? keys, Tensor? stat, Tensor? log_weight,"
    " Tensor scale, float? scale_bound, float hardness, float discount, bool detach_weights, Tensor[] intervals,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
