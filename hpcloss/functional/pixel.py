"""Contrast of sampled pixels of a batch, with an optional memory of past ones (ContrastiveSeg)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    check_label_values,
    check_used,
    checked,
    count,
    integers,
    labels_of_map,
)
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, merge, reduce
from hpcloss.memory import EmbeddingQueue
from hpcloss.pack import pack
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import Pairs, class_sort, from_offsets
from hpcloss.sampling import sample_anchors
from hpcloss.sorting import is_class


@checked
def pixel_contrast_loss(
    features: Tensor,
    labels: Tensor,
    predictions: Tensor | None = None,
    queue: EmbeddingQueue | None = None,
    temperature: float | Tensor = 0.07,
    *,
    num_classes: int,
    samples_per_class: int | None = 100,
    background: int | None = None,
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_labels: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of sampled pixels of the whole batch; equation and arguments in `PixelContrastLoss`."""
    labels = labels_of_map(features, labels)
    wrong = None if predictions is None else labels_of_map(features, predictions, "predictions") != labels
    ignored, num_classes = integers("ignore_index", ignore_index), count("num_classes", num_classes)
    samples_per_class = samples_per_class and count("samples_per_class", samples_per_class)
    background = None if background is None else integers("background", background)[0]
    if check_labels:
        check_label_values(labels, ignored, num_classes)
    backend, gather = resolve(backend, features), has_peers(gather)
    flat = labels.reshape(-1)
    pairs = _plan(labels, wrong, num_classes, samples_per_class, background, ignored)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), features=features)
    whole = samples_per_class is None
    rows = pack(features, pairs.order, pairs.live(), normalize=normalize, permutation=whole, backend=backend)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    keys = None
    if gather:
        pairs, keys = gather_keys(rows, pairs, flat[pairs.order])
    positives, negatives = pairs.counts()
    lse = pair_lse(rows, pairs, "negatives", scale, keys=keys, scale_bound=bound, backend=backend)
    if queue is None:
        loss, _ = pair_mean(rows, pairs, "own", scale, keys=keys, stat=lse, scale_bound=bound, backend=backend)
    else:
        _check_queue(queue, features, num_classes)
        bank = queue.bank(pairs, flat[pairs.order], rows.data.dtype, ignored)
        if check_finite:
            check_used((bank.log_bias == 0).nonzero().view(-1), queue=bank.keys.data)
        old = pair_lse(
            rows, bank.pairs, "negatives", scale, keys=bank.keys, bias=bank.log_bias, scale_bound=bound, backend=backend
        )
        lse = merge(lse, old)
        # No bound: the sum over both may be larger than one over the keys of either.
        loss, _ = pair_mean(rows, pairs, "own", scale, keys=keys, stat=lse, backend=backend)
        mean_of_old, _ = pair_mean(rows, bank.pairs, "own", scale, keys=bank.keys, stat=lse, backend=backend)
        # Masses of uniform weights are logarithms of counts.
        share = bank.positives.to(loss.dtype) / (positives + bank.positives).clamp(min=1)
        loss = queue.guard((1 - share) * loss + share * mean_of_old)
        positives, negatives = positives + bank.positives, negatives + bank.negatives
    counted = torch.minimum(positives, negatives) > 0  # others are 0: no mean, or log(1 + 0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


def _plan(
    labels: Tensor,
    wrong: Tensor | None,
    num_classes: int,
    samples_per_class: int | None,
    background: int | None,
    ignored: tuple[int, ...],
) -> Pairs:
    """The pixels of a label map [B, *S], or those drawn from each class of each image, as one region."""
    flat = labels.reshape(-1)
    if samples_per_class is None or flat.numel() == 0:
        order, offsets, _ = class_sort(flat, background=background, ignore_index=ignored, num_classes=num_classes)
    else:
        most = min(samples_per_class, labels[0].numel())
        drawn, ends = sample_anchors(labels, most, num_classes=num_classes, ignore_index=ignored, wrong=wrong)
        filled = torch.arange(drawn.numel(), device=drawn.device) < ends[-1]
        classes = torch.where(filled, flat[drawn], -1)
        by_class, offsets, _ = class_sort(classes, background=background, num_classes=num_classes)
        order = drawn[by_class]
    return from_offsets(order, offsets, num_classes, is_class(background, num_classes)).head(flat.numel())


def _check_queue(queue: EmbeddingQueue, features: Tensor, num_classes: int) -> None:
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(
            f"queue must be an EmbeddingQueue, got {type(queue).__name__}; a tensor [C, K, D] is taken by"
            " hpcloss.compat.contrastiveseg.PixelContrastLoss"
        )
    expected, got = (num_classes, features.shape[1]), (queue.num_classes, queue.dim)
    if got != expected:
        raise ValueError(f"queue must have (num_classes, dim) = {expected}, got {got}")
    if queue.embeddings.device != features.device:
        raise ValueError(f"queue must be on {features.device}, as features, got {queue.embeddings.device}")
