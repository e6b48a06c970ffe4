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
    """Weighted mean of a term over the positives of each anchor.

        out_i = Σ_{j∈P(i)} w_ij t_ij,      w_ij = softmax_{j∈P(i)}( -hardness · s_ij + log_weight_j )
        term "logit":  t_ij = scale · s_ij
        term "own":    t_ij = log( e^{(scale - discount) s_ij} + e^{stat_i} ) - scale · s_ij

    P(i) are the positives of anchor i and s_ij = ⟨anchor_i, key_j⟩ is the similarity. With stat_i, the log-sum-exp of
    the negatives, "own" is the cross-entropy of a positive against its own denominator. The result is differentiable in
    rows, scale and stat, once.

    Args:
        anchors: Packed anchors `[N, D]`.
        pairs: The keys of each anchor.
        term: "logit" or "own".
        scale: `Scale.of(temperature, anchors, normalize)`. With a bound, stat must be -inf or at most scale.bound +
            log(M); otherwise pass `scale.unbounded()`.
        keys: Packed keys `[M, D]`. None: the anchors.
        stat: stat_i `[N]` for the term "own".
        hardness: Exponent of the weights. 0: all positives have the same weight. Positive: dissimilar positives weigh
            more.
        log_weight: Logarithm of a weight of each key `[M]`. None: 0.
        discount: Discount of a positive in its own denominator, for the term "own".
        detach_weights: Treat the weights as constants in the gradient.

    Returns:
        out `[N]` and mass `[N]`. mass is the log-sum-exp of the weights' exponents, without gradient; results over
            parts of the keys merge by it. Without positives out is 0 and mass is -inf.

    Raises:
        ValueError: stat is missing for "own" or given for "logit", or anchors and keys are packed for different
            backends.
        NotImplementedError: The backend cannot run the call.

    Examples:
        >>> import torch
        >>> from hpcloss.plan.partition import partition
        >>> from hpcloss.primitives.pair_mean import pair_mean
        >>> from hpcloss.primitives.rows import pack
        >>> from hpcloss.primitives.scale import Scale
        >>> pairs = partition(torch.tensor([0, 0, 1]))
        >>> rows = pack(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), pairs.order, normalize=True)
        >>> out, mass = pair_mean(rows, pairs, "logit", Scale.of(0.1, rows, normalize=True))
        >>> out  # 0.6 / 0.1 twice, and no positive
        tensor([6., 6., 0.])
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
        ctx.set_materialize_grads(False)  # no zeros for the mass
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
