"""`pair_lse` and `pair_lse_both` of whole regions."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends import library
from hpcloss.backends.arithmetic import INF, LN2, LOG2E, accumulation, gradients_of_logits
from hpcloss.backends.dense.batches import Batch, batches, softmax_terms
from hpcloss.backends.dense.rows import add_gradients, is_native, native_logits
from hpcloss.plan.partition import Intervals


def _logits(batch: Batch, scale: Tensor, bias: Tensor | None, rule: str) -> Tensor:
    """(scale s_ij + bias_j) / ln 2 [R, n, m], lowered for pairs that the rule does not count."""
    logits = batch.similarities(scale * LOG2E)
    if bias is not None:
        logits += batch.take_keys(bias.to(logits.dtype) * LOG2E)[:, None]
    # A key with bias -inf has no share. Its logit is clamped, because -inf - -inf is NaN.
    return batch.exclude(logits if bias is None else logits.clamp_(min=batch.lowest), rule)


def _shares(logits: Tensor, lse: Tensor, dim: int) -> Tensor:
    """exp2(logits - lse), in place. A large lse is rounded, so each sum of a set that is not empty is made 1 again."""
    terms = logits.sub_(lse).exp2_()
    return terms.div_(terms.sum(dim, keepdim=True).clamp_(min=0.5))


def pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set or a row without anchor."""
    at, (anchors, keys) = Intervals(*intervals), accumulation(anchors, keys)
    lse = anchors.new_full(anchors.shape[:1], -INF)
    if bias is None and is_native(anchors):
        for group, given in native_logits(anchors, keys, at, scale):
            library.lse(given, rule, (1.0,), lse[group.anchors()])
        return lse.mul_(LN2)
    for batch in batches(anchors, keys, at):
        softmax = softmax_terms(_logits(batch, scale.to(lse.dtype), bias, rule), batch.lowest)
        batch.put(softmax.lse().mul_(LN2), lse)
    return lse


def pair_lse_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale exp(scale s_ij + bias_j - lse_i), as d anchors, d keys (one sum in self-contrast), d scale."""
    at, (anchors, keys) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    empty = lse == -INF
    grad, shift = torch.where(empty, 0.0, grad.to(anchors.dtype)), torch.where(empty, 0.0, lse) * LOG2E
    if bias is None and is_native(anchors):
        for group, given in native_logits(anchors, keys, at, scale):
            rows = group.anchors()
            library.lse_slopes(given, rule, (1.0,), shift[rows], grad[rows])
            add_gradients(group, given[0], anchors, keys, d_anchors, d_keys)
        return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)
    for batch in batches(anchors, keys, at):
        logits = _logits(batch, scale, bias, rule)
        slope = _shares(logits, batch.take(shift)[..., None], 2).mul_(batch.take(grad)[..., None])
        batch.add_gradients(slope, d_anchors, d_keys)
    return gradients_of_logits(anchors, keys, scale, d_anchors, d_keys, needs_anchors, needs_scale)


def pair_lse_both(
    anchors: Tensor, keys: Tensor, scale: Tensor, scale_bound: float | None, intervals: list[Tensor], rule: str
) -> tuple[Tensor, Tensor]:
    """lse over the keys of each anchor [N] and over the anchors of each key [M], from one S; -inf for an empty set."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    rows, columns = anchors.new_full(anchors.shape[:1], -INF), anchors.new_full(keys.shape[:1], -INF)
    if is_native(anchors) and others is not None:
        for group, given in native_logits(anchors, others, at, scale):
            library.lse(given, rule, (1.0,), rows[group.anchors()])
            library.lse_columns(given, rule, columns[group.keys()])
        return rows.mul_(LN2), columns.mul_(LN2)
    for batch in batches(anchors, others, at):
        logits = _logits(batch, scale.to(rows.dtype), None, rule)
        # A copy, also of a single row or column, which is contiguous both ways.
        transposed = logits.mT.clone(memory_format=torch.contiguous_format)
        of_keys = softmax_terms(transposed, batch.lowest).lse().mul_(LN2)
        batch.put(softmax_terms(logits, batch.lowest).lse().mul_(LN2), rows)
        batch.put_keys(of_keys, columns)
    return rows, columns


def pair_lse_both_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale (g_i exp(scale s_ij - row_i) + h_j exp(scale s_ij - column_j)), as d anchors, d keys, d scale."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = torch.zeros_like(keys, dtype=anchors.dtype) if needs_keys else None
    sides = [(grad_rows, rows), (grad_columns, columns)]
    of_rows, of_columns = (torch.where(lse == -INF, 0.0, grad.to(anchors.dtype)) for grad, lse in sides)
    rows, columns = (torch.where(lse == -INF, 0.0, lse) * LOG2E for _, lse in sides)
    if is_native(anchors) and others is not None:
        for group, given in native_logits(anchors, others, at, scale):
            own, met = group.anchors(), group.keys()
            library.lse_both_slopes(given, rule, rows[own], of_rows[own], columns[met], of_columns[met])
            add_gradients(group, given[0], anchors, others, d_anchors, d_keys)
        return gradients_of_logits(anchors, others, scale, d_anchors, d_keys, needs_anchors, needs_scale)
    for batch in batches(anchors, others, at):
        logits = _logits(batch, scale, None, rule)
        slope = _shares(logits.clone(), batch.take_keys(columns)[:, None], 1).mul_(batch.take_keys(of_columns)[:, None])
        slope.addcmul_(_shares(logits, batch.take(rows)[..., None], 2), batch.take(of_rows)[..., None])
        batch.add_gradients(slope, d_anchors, d_keys)
    return gradients_of_logits(anchors, others, scale, d_anchors, d_keys, needs_anchors, needs_scale)
