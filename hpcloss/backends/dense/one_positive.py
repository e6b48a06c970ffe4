"""`one_positive` from all similarities at once. Backward computes them, or their exponentials, again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import INF, LN2, LOG2E, accumulation, gradients_of_logits
from hpcloss.backends.blockwise.tiles import is_safe_for
from hpcloss.backends.dense.rows import is_native, write_both
from hpcloss.plan.partition import Intervals

# Below every log-sum-exp. It replaces the -inf of an empty set: exp2(-inf - LOWEST) is 0, exp2(-inf + inf) is NaN.
LOWEST = -1e30
# Below every sum of exponentials that backward divides by: `is_safe` with `twice` uses half of the exponent range.
SMALLEST = 1e-25


def one_positive(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    factors: Sequence[float],
    both: bool,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The positive's logit [N], the negatives' log-sum-exps [N] ([K, N] for K > 1), and a matrix for backward.

    The matrix [N, M] has the logits to base 2, or their exponentials if one serves all sums; -inf or 0 for pairs that
    are no negatives.
    """
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    logits = torch.mm(anchors * (scale.to(anchors.dtype) * LOG2E), (anchors if others is None else others).T)
    place = at.pos_start.long()[:, None]
    own = logits.gather(1, place).view(-1).mul_(LN2)
    logits.scatter_(1, place, -INF)
    if others is None:
        logits.fill_diagonal_(-INF)
    elif not both:
        _exclude_others(logits, at)
    safe = _is_safe(anchors, others, scale_bound, factors)
    if safe and tuple(factors) == (1.0,):
        of_rows = logits.exp2_().sum(1)
        return own, (torch.stack([of_rows, logits.sum(0)]) if both else of_rows).log_(), logits
    found = [_log_sum(_times(logits, factor), dim, safe) for factor, dim in _sums(factors, both)]
    return own, (found[0] if len(found) == 1 else torch.stack(found)).mul_(LN2), logits


def _is_safe(anchors: Tensor, keys: Tensor | None, scale_bound: float | None, factors: Sequence[float]) -> bool:
    """Whether no exponential needs a shift, in either pass."""
    return is_safe_for(anchors, keys, None if scale_bound is None else scale_bound * max(factors), twice=True)


def _sums(factors: Sequence[float], both: bool) -> list[tuple[float, int]]:
    """The factor and the dimension of each log-sum-exp."""
    return [(factor, dim) for factor in factors for dim in ((1, 0) if both else (1,))]


def _times(logits: Tensor, factor: float) -> Tensor:
    return logits if factor == 1 else logits * factor


def _exclude_others(logits: Tensor, at: Intervals) -> None:
    """Exclude each anchor from its own keys, and the keys outside the region."""
    count, reads = logits.shape[1], _reads(at)
    # Either all anchors are keys or none is. The host may read which, and that no key is outside.
    if not reads or (at.self_pos.numel() and int(at.self_pos[0]) >= 0):
        own = torch.where(at.self_pos < 0, at.pos_start, at.self_pos)  # the positive is excluded already
        logits.scatter_(1, own.long()[:, None], -INF)
    if not reads or int(at.key_end) - int(at.key_start) < count:
        key = torch.arange(count, device=logits.device)
        logits.masked_fill_((key < at.key_start) | (key >= at.key_end), -INF)


def _reads(at: Intervals) -> bool:
    return at.key_end.device.type == "cpu" and not torch.compiler.is_compiling()


def _log_sum(logits: Tensor, dim: int, safe: bool) -> Tensor:
    """The logarithm to base 2 of the sum of exp2 along a dimension; safe: no power overflows."""
    if safe:
        return logits.exp2().sum(dim).log2_()
    if not logits.shape[dim]:
        return logits.new_full((logits.shape[1 - dim],), -INF)
    shift = logits.amax(dim, keepdim=True).clamp_(min=LOWEST)
    return (logits - shift).exp2_().sum(dim).log2_().add_(shift.squeeze(dim))


def one_positive_backward(
    grad_own: Tensor,
    grad: Tensor,
    own: Tensor,
    lse: Tensor,
    kept: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    factors: Sequence[float],
    both: bool,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale sum_k g_k factor_k exp(factor_k logit_ij - lse_k), and scale g for the positive; as d anchors,
    d keys (one sum in self-contrast), d scale."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    grad_own, grad, scale = grad_own.to(anchors.dtype), grad.to(anchors.dtype), scale.to(anchors.dtype)
    if _is_safe(anchors, others, scale_bound, factors):
        slope = _safe_slope(kept, grad / lse.exp().clamp_(min=SMALLEST), factors, both)
    else:
        slope = _slope(kept, grad, (lse * LOG2E).clamp_(min=LOWEST), factors, both)
    slope.scatter_(1, at.pos_start.long()[:, None], grad_own[:, None])
    d_anchors, d_keys = None, None
    if others is None:
        if needs_anchors or needs_scale:
            d_anchors = _of_both_sides(slope, anchors)
    else:
        d_anchors = torch.mm(slope, others) if needs_anchors or needs_scale else None
        d_keys = torch.mm(slope.T, anchors) if needs_keys else None
    return gradients_of_logits(anchors, others, scale, d_anchors, d_keys, needs_anchors, needs_scale)


def _of_both_sides(slope: Tensor, rows: Tensor) -> Tensor:
    """The gradient of rows that are each other's anchors and keys."""
    if is_native(rows):
        gradient = torch.empty_like(rows)
        write_both(slope, slope.new_ones(slope.shape[0]), rows, 1, gradient)
        return gradient
    return torch.mm(slope.T.contiguous().add_(slope), rows)  # a copy first, because a sum with slope.T is slower


def _safe_slope(kept: Tensor, weight: Tensor, factors: Sequence[float], both: bool) -> Tensor:
    """sum_k w_k factor_k exp2(factor_k logit_ij), with w the gradient over the sum of the exponentials [K, N]."""
    if tuple(factors) == (1.0,):
        return kept * (weight[0][:, None] + weight[1] if both else weight[:, None])
    slope: Tensor | None = None
    for (factor, dim), one in zip(_sums(factors, both), weight.view(len(factors), -1)):
        terms, one = (kept * factor).exp2_(), (one * factor).unsqueeze(dim)
        slope = terms.mul_(one) if slope is None else slope.addcmul_(terms, one)
    return kept if slope is None else slope


def _slope(logits: Tensor, grad: Tensor, shift: Tensor, factors: Sequence[float], both: bool) -> Tensor:
    """sum_k g_k factor_k exp2(factor_k logit_ij - shift_k), which overflows nowhere."""
    slope: Tensor | None = None
    sums = _sums(factors, both)
    grad, shift = (values.view(len(sums), -1) for values in (grad, shift))
    for (factor, dim), weight, above in zip(sums, grad, shift):
        terms = (_times(logits, factor) - above.unsqueeze(dim)).exp2_()
        weight = _times(weight, factor).unsqueeze(dim)
        slope = terms.mul_(weight) if slope is None else slope.addcmul_(terms, weight)
    return logits if slope is None else slope
