"""Prototypes contrasted with one another, and pixels assigned to the prototypes of their class (PCCS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    VECTORS_IGNORED,
    check_classes_and_ignored,
    check_used,
    check_vectors,
    checked,
    integers,
    labels_of_map,
    labels_of_vectors,
)
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce, softmax, sum_of
from hpcloss.functional.contrast import Contrast
from hpcloss.ops import differentiable_once, plain
from hpcloss.pack import pack
from hpcloss.partition import class_sort, partition
from hpcloss.prototypes import sinkhorn, unit

ROWS = 1 << 12  # whose similarities to all prototypes are in memory at once


@checked
def prototype_contrast_loss(
    prototypes: Tensor,
    labels: Tensor,
    probs: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    hardness: float | None = None,
    *,
    detach_weights: bool = False,
    ignore_index: int | Sequence[int] = VECTORS_IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of prototypes, uncertain ones weighing more; equation and arguments in `PrototypeContrastLoss`."""
    check_vectors("prototypes", prototypes)
    labels = labels_of_vectors("labels", prototypes, labels)
    if probs is not None and (probs.dim() != 2 or probs.shape[0] != prototypes.shape[0]):
        raise ValueError(f"probs must have shape [{prototypes.shape[0]}, C], got {tuple(probs.shape)}")
    backend, gather = resolve(backend, prototypes), has_peers(gather)
    pairs = partition(labels, ignore_index=integers("ignore_index", ignore_index))
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), prototypes=prototypes)
    rows = pack(prototypes, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    if hardness is None:
        hardness = -1 / float(temperature)
    keys = None
    if gather:
        pairs, keys = gather_keys(rows, pairs, labels[pairs.order])
    loss, counted = Contrast(rows, "own", hardness, 0.0, scale, bound, detach_weights, backend)(pairs, keys)
    if probs is not None:
        if check_finite:
            check_used(pairs.order[counted], probs=probs)
        entropy = _entropy(plain(probs).index_select(0, pairs.order).to(loss.dtype), counted)
        loss = loss * softmax(entropy, counted, gather) * sum_of(counted, gather)
    return reduce(loss, counted, reduction, pairs.order, gather=gather)


def _entropy(probs: Tensor, counted: Tensor) -> Tensor:
    """Entropy of the probabilities of counted prototypes [N]; 0 log 0 = 0."""
    probs = torch.where(counted[:, None], probs, 0.0)
    probs = torch.where(probs < math.inf, probs, math.nan)  # its entropy would be -inf: no weight, and nobody would see
    return -(probs * torch.where(probs > 0, probs, 1.0).log()).sum(1)


@checked
def prototype_assignment_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    teacher_features: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    iterations: int = 4,
    epsilon: float = 0.05,
    ignore_index: int | Sequence[int] = IGNORED,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Classification by prototypes, balanced within a class; equation, arguments in `PrototypeAssignmentLoss`."""
    labels = labels_of_map(features, labels)
    if not prototypes.is_floating_point():
        raise TypeError(f"prototypes must be floating point, got {prototypes.dtype}")
    if prototypes.dim() != 3 or prototypes.shape[2] != features.shape[1] or prototypes.shape[0] == 0:
        raise ValueError(f"prototypes must have shape [C, K, {features.shape[1]}], got {tuple(prototypes.shape)}")
    teacher = features if teacher_features is None else teacher_features
    if teacher.shape != features.shape:
        raise ValueError(
            f"teacher_features must have shape {tuple(features.shape)}, as features, got {tuple(teacher.shape)}"
        )
    backend, gather = resolve(backend, features), has_peers(gather)
    num_classes, flat, ignored = prototypes.shape[0], labels.reshape(-1), integers("ignore_index", ignore_index)
    check_classes_and_ignored(num_classes, ignored)
    order, offsets, _ = class_sort(flat, ignore_index=ignored, num_classes=num_classes)
    if check_finite:
        check_used(temperature=temperature, prototypes=prototypes)
        check_used(order, offsets[-1:], features=features, teacher_features=teacher)
    rows = pack(features, order, offsets[-1:], normalize=True, permutation=True, backend=backend)
    scale, _ = inverse_temperature(temperature, rows, True)

    directions = unit(plain(prototypes).detach().to(scale.dtype))
    there = (directions != 0).any(-1)
    row = torch.arange(order.numel(), device=flat.device)
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        judged = pack(teacher, order, offsets[-1:], normalize=True, backend=backend).data.to(scale.dtype)
        scores = torch.einsum("nd,ckd->cnk", judged, directions)
        scores = torch.where(there[:, None], scores, -math.inf)
        member = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
        share = sinkhorn(scores, member, iterations=iterations, epsilon=epsilon)
    by_row, absent = share.movedim(1, 0).flatten(1), ~there.flatten()
    with torch.autocast(flat.device.type, enabled=False):
        loss = _CrossEntropy.apply(rows.data, rows.companion, directions.flatten(0, 1), absent, by_row, scale)
    counted = (member & there.any(1, keepdim=True)).any(0)
    return reduce(torch.where(counted, loss, 0.0), counted, reduction, order, labels, gather=gather)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of the softmax over all prototypes and an assignment to them.

    rows [N, D], prototypes [P, D], both of unit length; absent [P]: prototypes that are not there; share [N, P]: the
    assignment, whose sum is 1, or 0 for a row that takes no part. Differentiable in the rows' companion and the scale.
    Both gradients are made in the forward pass, where the similarities are: D numbers are saved for a row, not P.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, companion: Tensor, prototypes: Tensor, absent: Tensor, share: Tensor, scale: Tensor
    ) -> Tensor:
        losses, of_rows, of_scale = [], [], []
        for part, weight in zip(rows.split(ROWS), share.split(ROWS)):
            similarity = part.to(prototypes.dtype) @ prototypes.T
            log_p = torch.log_softmax((scale * similarity).masked_fill(absent, -math.inf), 1).masked_fill(absent, 0.0)
            losses.append(-(weight * log_p).sum(1))
            # p - share, in one difference: two sums that are subtracted leave rounding errors near the minimum.
            slope = log_p.exp().masked_fill(absent, 0.0) * weight.sum(1, keepdim=True) - weight
            of_rows.append(scale * (slope @ prototypes))
            of_scale.append((slope * similarity).sum(1))
        loss = torch.cat(losses)
        # The loss because second derivatives must find the graph in what is saved (`differentiable_once`).
        ctx.save_for_backward(loss, torch.cat(of_rows), torch.cat(of_scale))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, of_rows, of_scale = ctx.saved_tensors
        return None, grad[:, None] * of_rows, None, None, None, (grad * of_scale).sum()
