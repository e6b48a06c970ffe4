"""`one_positive` over tiles: the positives' logits row by row, the rest as in `pair_lse`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import accumulation, gradients
from hpcloss.backends.blockwise.pair_lse import pair_lse, pair_lse_backward, pair_lse_both, pair_lse_both_backward
from hpcloss.plan.partition import Intervals

ROWS = 1 << 12  # rows gathered at a time


def one_positive(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    factors: Sequence[float],
    both: bool,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The positive's logit [N], the negatives' log-sum-exps [N] ([K, N] for K > 1), and an empty tensor."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    own, scale = anchors.new_empty(anchors.shape[0]), scale.to(anchors.dtype)
    for rows, place in _parts(at):
        partners = (anchors if others is None else others).index_select(0, place)
        torch.mul(torch.linalg.vecdot(anchors[rows], partners), scale, out=own[rows])
    if both and others is not None:
        lse = torch.stack(pair_lse_both(anchors, others, scale, scale_bound, intervals, "negatives"))
    else:
        lse = pair_lse(anchors, others, None, scale, scale_bound, intervals, "negatives", factors)
    return own, lse, anchors.new_empty(0, 0)


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
    """Gradients of the log-sum-exps, to which those of the positives' logits are added."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    scale, grad_own = scale.to(anchors.dtype), grad_own.to(anchors.dtype)
    options = scale, scale_bound, intervals, "negatives", needs_anchors, needs_keys, needs_scale
    if both and others is not None:
        d_anchors, d_keys, d_scale = pair_lse_both_backward(grad[0], grad[1], lse[0], lse[1], anchors, others, *options)
    else:
        d_anchors, d_keys, d_scale = pair_lse_backward(grad, lse, anchors, others, None, *options, factors)
    into = d_anchors if others is None else d_keys
    for rows, place in _parts(at):
        weight = (grad_own[rows] * scale)[:, None]
        partners = (anchors if others is None else others).index_select(0, place)
        if needs_scale:
            d_scale = d_scale + torch.dot(grad_own[rows], torch.linalg.vecdot(anchors[rows], partners))
        if needs_anchors:
            d_anchors[rows].addcmul_(partners, weight)
        if into.numel():
            into.index_add_(0, place, anchors[rows] * weight)
    return gradients(anchors, d_anchors, d_keys, d_scale)


def _parts(at: Intervals) -> Iterator[tuple[slice, Tensor]]:
    """Rows and the keys that are their positives, some at a time."""
    for first in range(0, at.pos_start.numel(), ROWS):
        rows = slice(first, first + ROWS)
        yield rows, at.pos_start[rows].long()
