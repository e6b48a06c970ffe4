"""Prototypes contrasted with one another, and pixels assigned to the prototypes of their class (PCCS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from hpcloss.ops import plain
from hpcloss.pack import pack
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import class_sort, from_offsets_against, paired, partition
from hpcloss.prototypes import sinkhorn, unit


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
    scale, bound = inverse_temperature(temperature, rows, True)

    directions = unit(plain(prototypes).detach().to(scale.dtype))
    there = (directions != 0).any(-1)
    classes = torch.arange(num_classes, device=flat.device)
    key_order, key_offsets, _ = class_sort(torch.where(there, classes[:, None], -1), num_classes=num_classes)
    flat_keys = directions.flatten(0, 1)
    keys = pack(flat_keys, key_order, key_offsets[-1:], normalize=False, permutation=True, backend=backend)
    pairs = from_offsets_against(order, offsets, key_offsets, num_classes)
    every = pair_lse(rows, pairs, "every", scale, keys=keys, scale_bound=bound, backend=backend)

    row = torch.arange(order.numel(), device=flat.device)
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        judged = pack(teacher, order, offsets[-1:], normalize=True, backend=backend).data.to(scale.dtype)
        scores = torch.einsum("nd,ckd->cnk", judged, directions)
        scores = torch.where(there[:, None], scores, -math.inf)
        member = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
        share = sinkhorn(scores, member, iterations=iterations, epsilon=epsilon)
        # The logits of a row are linear in its keys, so what the assignment averages are the prototypes.
        target = torch.einsum("cnk,ckd->nd", share, directions)
    to_target = paired(pairs, row).replace(key_end=offsets[-1:].to(pairs.key_end))
    targets = pack(target, row, normalize=False, permutation=True, backend=backend)
    mean, _ = pair_mean(rows, to_target, "logit", scale, keys=targets, backend=backend)
    counted = pairs.counts()[0] > 0
    loss = torch.where(counted, torch.where(counted, every, 0.0) - mean, 0.0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)
