"""The streaming primitives: `pair_lse`, `pair_mean` and `pair_cross_entropy`. Every loss is a recipe over them.

All work on packed rows and on intervals (`Pairs`); neither ever holds an N x M matrix. `keys=None` is self-contrast:
the keys are the anchors, and one backward pass serves both sides of every pair.

Forward and backward are separate operators, joined here by autograd functions. Backward twice raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.backends import load
from hpcloss.ops import differentiable_once, register, statistics_dtype
from hpcloss.pack import Rows
from hpcloss.partition import Pairs

RULES = ("positives", "negatives", "others", "every")


def pair_lse(
    anchors: Rows,
    pairs: Pairs,
    rule: str,
    scale: Tensor,
    *,
    keys: Rows | None = None,
    bias: Tensor | None = None,
    scale_bound: float | None = None,
    backend: str = "blockwise",
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j), with s_ij = <anchor_i, key_j>. [N], fp32 (float64).

    rule: "positives", "negatives", "others" (both; never the anchor itself) or "every" (all keys of the region).
    An empty set, and a row that is no anchor, gives -inf and no gradient. Results over parts of the keys merge by
    logaddexp. scale: 0-dim tensor, differentiable. bias [M]: log-multiplicity of each key, not differentiable.
    scale_bound: 1 / temperature as a number, only where rows are normalised (then |scale s_ij| cannot exceed it); it
    only chooses a faster, equal sum.
    """
    grad_keys = None if keys is None else keys.companion
    key_data = None if keys is None else keys.data
    return _PairLse.apply(
        anchors.data,
        anchors.companion,
        key_data,
        grad_keys,
        bias,
        scale,
        scale_bound,
        rule,
        backend,
        *pairs.intervals(),
    )


def pair_lse_both(
    anchors: Rows,
    keys: Rows,
    pairs: Pairs,
    rule: str,
    scale: Tensor,
    *,
    scale_bound: float | None = None,
    backend: str = "blockwise",
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of one S, for two-sided losses.

    rows_i = log sum_j exp(scale s_ij) over the keys that anchor i may meet [N], columns_j = log sum_i exp(scale s_ij)
    over the anchors that may meet key j [M]. Each is `pair_lse` of one direction; but the backward pass serves both
    with one sweep for the anchors and one for the keys. Regions must not share keys.

    rule: "every", or "negatives". "negatives" needs pairs that are their own inverse (N = M): the positives of key j
    are the anchors whose numbers lie in the interval of anchor j, as in `one_to_one`.
    """
    if rule not in ("every", "negatives"):
        raise ValueError(f"rule must be 'every' or 'negatives', got {rule!r}")
    if rule == "negatives" and anchors.data.shape[0] != keys.data.shape[0]:
        raise ValueError(
            f"rule 'negatives' needs as many keys as anchors, got {keys.data.shape[0]} and {anchors.data.shape[0]}"
        )
    return _PairLseBoth.apply(
        anchors.data, anchors.companion, keys.data, keys.companion, scale, scale_bound, rule, backend,
        *pairs.intervals(),
    )  # fmt: skip


def pair_mean(
    anchors: Rows,
    pairs: Pairs,
    term: str,
    scale: Tensor,
    *,
    keys: Rows | None = None,
    stat: Tensor | None = None,
    hardness: float = 0.0,
    log_weight: Tensor | None = None,
    discount: float = 0.0,
    detach_weights: bool = True,
    scale_bound: float | None = None,
    backend: str = "blockwise",
) -> tuple[Tensor, Tensor]:
    """out_i = sum_{j in positives(i)} w_ij t_ij, w = softmax over the positives of (-hardness s_ij + log_weight_j).

    term "logit": t = scale s.  term "own": t = softplus(stat_i - (scale - discount) s) - discount s, the cross-entropy
    of a positive against its own denominator e^{(scale - discount) s} + e^{stat_i}.
    Returns (out, mass), [N] each; mass is the log-sum-exp of the weights, not differentiable: results over parts of the
    keys merge by their masses. An empty set gives out 0 and mass -inf. Differentiable in rows, scale and stat; through
    the weights only with `detach_weights=False`. scale_bound: as in `pair_lse`, or more; then |stat| must not exceed
    that of a log-sum-exp over as many keys, scale_bound + log(M), or -inf.
    """
    if (term == "own") != (stat is not None):
        raise ValueError(f"term {term!r} {'needs' if stat is None else 'takes no'} stat")
    grad_keys = None if keys is None else keys.companion
    key_data = None if keys is None else keys.data
    return _PairMean.apply(
        anchors.data, anchors.companion, key_data, grad_keys, stat, log_weight, scale, scale_bound,
        float(hardness), float(discount), detach_weights, backend, *pairs.intervals(),
    )  # fmt: skip


def pair_cross_entropy(
    anchors: Rows,
    pairs: Pairs,
    scale: Tensor,
    *,
    keys: Rows | None = None,
    hardness: float = 0.0,
    scale_bound: float | None = None,
    backend: str = "blockwise",
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the positives' weights and the softmax over all keys: a log-sum-exp less the positives' mean.

        loss_i = -sum_{j in positives(i)} w_ij log p_ij,    p_ij = exp(scale s_ij - lse_i)
        lse_i = log sum_{j in others(i)} exp(scale s_ij),   w = softmax over the positives of (-hardness s_ij), detached

    Backward forms dS_ij = scale (p_ij - w_ij) grad_i per pair, before the one product with the keys. Near the minimum
    of a loss p and w cancel, and the gradients of two primitives, subtracted, would be rounding errors. For the same
    reason the loss is formed relative to the largest logit of a row, so that it is never negative.

    Returns (loss, lse, mass), [N] each, fp32 (float64). loss and lse are differentiable, in rows and scale. mass is the
    log-sum-exp of the weights, as in `pair_mean`. A row without positives has loss 0 and mass -inf. Arguments as in
    `pair_lse`. Results over parts a of the keys merge, without a difference that cancels:

        lse = log sum_a exp(lse_a),    loss = sum_a share_a (loss_a + lse - lse_a),    share = softmax over a of mass_a
    """
    grad_keys = None if keys is None else keys.companion
    key_data = None if keys is None else keys.data
    return _PairCrossEntropy.apply(
        anchors.data, anchors.companion, key_data, grad_keys, scale, scale_bound, float(hardness), backend,
        *pairs.intervals(),
    )  # fmt: skip


class _PairLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        grad_anchors: Tensor,
        keys: Tensor | None,
        grad_keys: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        scale_bound: float | None,
        rule: str,
        backend: str,
        *intervals: Tensor,
    ) -> Tensor:
        lse = torch.ops.hpcloss.pair_lse(anchors, keys, bias, scale, scale_bound, list(intervals), rule, backend)
        ctx.save_for_backward(lse, anchors, keys, bias, scale, *intervals)
        ctx.rule, ctx.scale_bound, ctx.backend = rule, scale_bound, backend
        return lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, anchors, keys, bias, scale, *intervals = ctx.saved_tensors
        needs_anchors, needs_keys, needs_scale = (ctx.needs_input_grad[index] for index in (1, 3, 5))
        d_anchors, d_keys, d_scale = torch.ops.hpcloss.pair_lse_backward(
            grad,
            lse,
            anchors,
            keys,
            bias,
            scale,
            ctx.scale_bound,
            intervals,
            ctx.rule,
            needs_anchors,
            needs_keys,
            needs_scale,
            ctx.backend,
        )
        return (
            None,
            d_anchors if needs_anchors else None,
            None,
            d_keys if needs_keys else None,
            None,
            d_scale.to(scale.dtype) if needs_scale else None,
            *(None,) * (3 + len(intervals)),
        )


class _PairLseBoth(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        grad_anchors: Tensor,
        keys: Tensor,
        grad_keys: Tensor,
        scale: Tensor,
        scale_bound: float | None,
        rule: str,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, columns = torch.ops.hpcloss.pair_lse_both(
            anchors, keys, scale, scale_bound, list(intervals), rule, backend
        )
        ctx.save_for_backward(rows, columns, anchors, keys, scale, *intervals)
        ctx.rule, ctx.scale_bound, ctx.backend = rule, scale_bound, backend
        return rows, columns

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, anchors, keys, scale, *intervals = ctx.saved_tensors
        needs_anchors, needs_keys, needs_scale = (ctx.needs_input_grad[index] for index in (1, 3, 4))
        d_anchors, d_keys, d_scale = torch.ops.hpcloss.pair_lse_both_backward(
            grad_rows, grad_columns, rows, columns, anchors, keys, scale, ctx.scale_bound, intervals, ctx.rule,
            needs_anchors, needs_keys, needs_scale, ctx.backend,
        )  # fmt: skip
        return (
            None,
            d_anchors if needs_anchors else None,
            None,
            d_keys if needs_keys else None,
            d_scale.to(scale.dtype) if needs_scale else None,
            *(None,) * (3 + len(intervals)),
        )


class _PairMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        grad_anchors: Tensor,
        keys: Tensor | None,
        grad_keys: Tensor | None,
        stat: Tensor | None,
        log_weight: Tensor | None,
        scale: Tensor,
        scale_bound: float | None,
        hardness: float,
        discount: float,
        detach_weights: bool,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, mass, slope = torch.ops.hpcloss.pair_mean(
            anchors, keys, stat, log_weight, scale, scale_bound, hardness, discount, list(intervals), backend
        )
        ctx.save_for_backward(out, mass, slope, anchors, keys, stat, log_weight, scale, *intervals)
        ctx.options = scale_bound, hardness, discount, detach_weights
        ctx.backend = backend
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # or zeros would be made for the mass
        return out, mass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_mass: None) -> tuple[Tensor | None, ...]:
        out, mass, slope, anchors, keys, stat, log_weight, scale, *intervals = ctx.saved_tensors
        if grad is None:
            return (None,) * (12 + len(intervals))
        needs_anchors, needs_keys, needs_stat, needs_scale = (ctx.needs_input_grad[index] for index in (1, 3, 4, 6))
        d_anchors = d_keys = d_scale = None
        if needs_anchors or needs_keys or needs_scale:
            d_anchors, d_keys, d_scale = torch.ops.hpcloss.pair_mean_backward(
                grad, out, mass, anchors, keys, stat, log_weight, scale, *ctx.options, intervals,
                needs_anchors, needs_keys, needs_scale, ctx.backend,
            )  # fmt: skip
        return (
            None,
            d_anchors if needs_anchors else None,
            None,
            d_keys if needs_keys else None,
            grad * slope if needs_stat else None,
            None,
            d_scale.to(scale.dtype) if d_scale is not None and needs_scale else None,
            *(None,) * (5 + len(intervals)),
        )


class _PairCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        grad_anchors: Tensor,
        keys: Tensor | None,
        grad_keys: Tensor | None,
        scale: Tensor,
        scale_bound: float | None,
        hardness: float,
        backend: str,
        *intervals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, lse, mass, shift, total = torch.ops.hpcloss.pair_cross_entropy(
            anchors, keys, scale, scale_bound, hardness, list(intervals), backend
        )
        # The loss because second derivatives must find the graph in what is saved (`differentiable_once`).
        ctx.save_for_backward(loss, mass, shift, total, anchors, keys, scale, *intervals)
        ctx.options, ctx.backend = (scale_bound, hardness), backend
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # or zeros would be made for an lse that nobody uses
        return loss, lse, mass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, grad_mass: None) -> tuple[Tensor | None, ...]:
        _, mass, shift, total, anchors, keys, scale, *intervals = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * (8 + len(intervals))
        needs_anchors, needs_keys, needs_scale = (ctx.needs_input_grad[index] for index in (1, 3, 4))
        d_anchors, d_keys, d_scale = torch.ops.hpcloss.pair_cross_entropy_backward(
            torch.zeros_like(mass) if grad is None else grad, grad_lse, mass, shift, total, anchors, keys, scale,
            *ctx.options, intervals, needs_anchors, needs_keys, needs_scale, ctx.backend,
        )  # fmt: skip
        return (
            None,
            d_anchors if needs_anchors else None,
            None,
            d_keys if needs_keys else None,
            d_scale.to(scale.dtype) if needs_scale else None,
            *(None,) * (3 + len(intervals)),
        )


def _pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    backend: str,
) -> Tensor:
    return load(backend).pair_lse(anchors, keys, bias, scale, scale_bound, intervals, rule)


def _pair_lse_fake(anchors: Tensor, *_: Any) -> Tensor:
    return anchors.new_empty(anchors.shape[:1], dtype=statistics_dtype(anchors.dtype))


def _pair_lse_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_lse_backward(grad, *args[:-1])  # the last is the backend


def _gradients_fake(
    anchors: Tensor, keys: Tensor | None, needs_anchors: bool, needs_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(anchors.dtype)
    d_anchors = anchors.new_empty(anchors.shape if needs_anchors else (0,), dtype=dtype)
    d_keys = anchors.new_empty(keys.shape if keys is not None and needs_keys else (0,), dtype=dtype)
    return d_anchors, d_keys, anchors.new_empty((), dtype=dtype)


def _pair_lse_backward_fake(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_fake(anchors, keys, needs_anchors, needs_keys)


def _pair_lse_both(anchors: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return load(args[-1]).pair_lse_both(anchors, *args[:-1])  # the last is the backend


def _pair_lse_both_fake(anchors: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(anchors.dtype)
    return anchors.new_empty(anchors.shape[:1], dtype=dtype), anchors.new_empty(keys.shape[:1], dtype=dtype)


def _pair_lse_both_backward(grad_rows: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_lse_both_backward(grad_rows, *args[:-1])  # the last is the backend


def _pair_lse_both_backward_fake(
    grad_rows: Tensor, grad_columns: Tensor, rows: Tensor, columns: Tensor, anchors: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_anchors, needs_keys, _, _ = rest[-4:]
    return _gradients_fake(anchors, keys, needs_anchors, needs_keys)


def _pair_mean(anchors: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_mean(anchors, *args[:-1])  # the last is the backend


def _pair_mean_fake(anchors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(anchors.dtype)
    return tuple(anchors.new_empty(anchors.shape[:1], dtype=dtype) for _ in range(3))  # type: ignore[return-value]


def _pair_mean_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_mean_backward(grad, *args[:-1])  # the last is the backend


def _pair_mean_backward_fake(
    grad: Tensor, out: Tensor, mass: Tensor, anchors: Tensor, keys: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_anchors, needs_keys, _, _ = rest[-4:]
    return _gradients_fake(anchors, keys, needs_anchors, needs_keys)


def _pair_cross_entropy(anchors: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_cross_entropy(anchors, *args[:-1])  # the last is the backend


def _pair_cross_entropy_fake(anchors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(anchors.dtype)
    return tuple(anchors.new_empty(anchors.shape[:1], dtype=dtype) for _ in range(5))  # type: ignore[return-value]


def _pair_cross_entropy_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return load(args[-1]).pair_cross_entropy_backward(grad, *args[:-1])  # the last is the backend


def _pair_cross_entropy_backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    mass: Tensor,
    shift: Tensor,
    total: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_anchors, needs_keys, _, _ = rest[-4:]
    return _gradients_fake(anchors, keys, needs_anchors, needs_keys)


register(
    "pair_lse",
    "(Tensor anchors, Tensor? keys, Tensor? bias, Tensor scale, float? scale_bound, Tensor[] intervals, str rule,"
    " str backend) -> Tensor",
    _pair_lse,
    _pair_lse_fake,
)
register(
    "pair_lse_backward",
    "(Tensor grad, Tensor lse, Tensor anchors, Tensor? keys, Tensor? bias, Tensor scale, float? scale_bound,"
    " Tensor[] intervals, str rule,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _pair_lse_backward,
    _pair_lse_backward_fake,
)
register(
    "pair_lse_both",
    "(Tensor anchors, Tensor keys, Tensor scale, float? scale_bound, Tensor[] intervals, str rule, str backend)"
    " -> (Tensor, Tensor)",
    _pair_lse_both,
    _pair_lse_both_fake,
)
register(
    "pair_lse_both_backward",
    "(Tensor grad_rows, Tensor grad_columns, Tensor rows, Tensor columns, Tensor anchors, Tensor keys, Tensor scale,"
    " float? scale_bound, Tensor[] intervals, str rule, bool needs_anchors, bool needs_keys, bool needs_scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _pair_lse_both_backward,
    _pair_lse_both_backward_fake,
)
register(
    "pair_mean",
    "(Tensor anchors, Tensor? keys, Tensor? stat, Tensor? log_weight, Tensor scale, float? scale_bound,"
    " float hardness, float discount, Tensor[] intervals, str backend) -> (Tensor, Tensor, Tensor)",
    _pair_mean,
    _pair_mean_fake,
)
register(
    "pair_mean_backward",
    "(Tensor grad, Tensor out, Tensor mass, Tensor anchors, Tensor? keys, Tensor? stat, Tensor? log_weight,"
    " Tensor scale, float? scale_bound, float hardness, float discount, bool detach_weights, Tensor[] intervals,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _pair_mean_backward,
    _pair_mean_backward_fake,
)
register(
    "pair_cross_entropy",
    "(Tensor anchors, Tensor? keys, Tensor scale, float? scale_bound, float hardness, Tensor[] intervals, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pair_cross_entropy,
    _pair_cross_entropy_fake,
)
register(
    "pair_cross_entropy_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor mass, Tensor shift, Tensor total, Tensor anchors, Tensor? keys,"
    " Tensor scale, float? scale_bound, float hardness, Tensor[] intervals,"
    " bool needs_anchors, bool needs_keys, bool needs_scale, str backend) -> (Tensor, Tensor, Tensor)",
    _pair_cross_entropy_backward,
    _pair_cross_entropy_backward_fake,
)
