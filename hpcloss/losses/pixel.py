"""Contrast of sampled pixels of a batch, with an optional memory of past ones (ContrastiveSeg)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hpcloss.arithmetic import merge
from hpcloss.checks import check_used
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce
from hpcloss.memory import EmbeddingQueue
from hpcloss.plan.labels import IGNORED, check_label_values, labels_of_map
from hpcloss.plan.partition import Pairs, class_sort
from hpcloss.plan.sampling import sample_anchors
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale


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
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
    if check_labels:
        check_label_values(labels, ignored, num_classes)
    flat = labels.reshape(-1)
    pairs = _plan(labels, wrong, num_classes, samples_per_class, background, ignored)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), features=features)
    whole = samples_per_class is None
    rows = pack(features, pairs.order, pairs.live(), normalize=normalize, permutation=whole, backend=backend)
    scale, keys, gather = Scale.of(temperature, rows, normalize), None, has_peers(gather)
    if gather:
        pairs, keys = gather_keys(rows, pairs, flat[pairs.order])
    positives, negatives = pairs.intervals.counts()
    lse = pair_lse(rows, pairs, "negatives", scale, keys=keys)
    if queue is None:
        loss, _ = pair_mean(rows, pairs, "own", scale, keys=keys, stat=lse)
    else:
        _check_queue(queue, features, num_classes)
        bank = queue.bank(rows, pairs, flat[pairs.order], ignored)
        if check_finite:
            check_used((bank.log_bias == 0).nonzero().view(-1), queue=bank.keys.data)
        lse = merge(lse, pair_lse(rows, bank.pairs, "negatives", scale, keys=bank.keys, bias=bank.log_bias))
        scale = scale.unbounded()  # the sum over both may be larger than one over the keys of either
        loss, _ = pair_mean(rows, pairs, "own", scale, keys=keys, stat=lse)
        mean_of_old, _ = pair_mean(rows, bank.pairs, "own", scale, keys=bank.keys, stat=lse)
        # Masses of uniform weights are logarithms of counts.
        share = bank.positives.to(loss.dtype) / (positives + bank.positives).clamp(min=1)
        loss = queue.guard((1 - share) * loss + share * mean_of_old)
        positives, negatives = positives + bank.positives, negatives + bank.negatives
    counted = torch.minimum(positives, negatives) > 0  # others are 0: no mean, or log(1 + 0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


class PixelContrastLoss(Loss):
    r"""Cross-image pixel contrast: a few pixels of each class of each image, hard and easy, against all of the batch.

        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    l_ij = s_ij / temperature, s_ij the cosine; P(i) and N(i) are the other drawn pixels with the label of i and with
    another one, and the embeddings of a queue alike (the authors' code takes those of the queue alone, where there is
    one). Anchors and keys are the same sample.

    Wang et al., "Exploring cross-image pixel contrast for semantic segmentation" (ICCV 2021; ContrastiveSeg); also that
    of UGPCL (Wang et al., IJCAI 2022), who ignore the pixels of uncertain pseudo-labels (give them an ignored label)
    and keep segments in the memory (`EmbeddingQueue.enqueue_means`). The factor temperature / base temperature of the
    code, 1 at its temperature of 0.07, is left out. Not reproduced: classes of few pixels dropped (here they are taken
    whole), a budget of samples divided by the number of classes in the batch, and with a memory the mask of "self"
    laid over arbitrary keys, zero rows as keys of class 0, and pixels stored under a class they do not belong to.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        num_classes: labels outside [0, num_classes) are ignored.
        samples_per_class: draw at most this many pixels of each class of each image, by torch's generator; None: take
            every pixel. With predictions half of them are wrongly predicted ones, as far as there are any.
        background: label that is a key but never an anchor. None, as published: every class has anchors.
        ignore_index: label or labels of pixels that take no part; embeddings of such a class in a queue neither.
        normalize: L2-normalise features; rows of norm up to 1e-12 become zero and get no gradient. The embeddings of
            a queue are unit rows in any case.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum", or "none" (a map [B, *S], 0 where
            not drawn or not counted).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_labels: raise for labels outside [0, num_classes) that are not ignored (waits for the device).
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".

    An anchor counts if it has a positive and a negative. No counted anchor: 0, joined to the graph. Raises ValueError
    for shapes and hyper-parameters, TypeError for dtypes, NotImplementedError for a backend that cannot run; never for
    data. Differentiating twice raises.
    """

    def __init__(
        self,
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
    ):
        super().__init__(
            pixel_contrast_loss,
            temperature=temperature, num_classes=num_classes, samples_per_class=samples_per_class,
            background=background, ignore_index=ignore_index, normalize=normalize, reduction=reduction,
            gather=gather, check_labels=check_labels, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        predictions: Tensor | None = None,
        queue: EmbeddingQueue | None = None,
    ) -> Tensor:
        """features [B, D, *S], any float dtype and strides; labels [B, *S] or [B, 1, *S], resized by nearest neighbour.

        predictions: class indices like the labels (logits.argmax(1)); pixels where they differ from the label are hard.
        queue: embeddings of past batches as further keys, without gradient; enqueue after backward.
        """
        return unchecked(pixel_contrast_loss)(features, labels, predictions, queue, **self.options)


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
        rows = class_sort(flat, background=background, ignore_index=ignored, num_classes=num_classes)
    else:
        most = min(samples_per_class, labels[0].numel())
        drawn, ends = sample_anchors(labels, most, num_classes=num_classes, ignore_index=ignored, wrong=wrong)
        filled = torch.arange(drawn.numel(), device=drawn.device) < ends[-1]
        classes = torch.where(filled, flat[drawn], -1)
        rows = class_sort(classes, background=background, num_classes=num_classes)
        rows = rows.replace(order=drawn[rows.order])
    return rows.pairs().head(flat.numel())


def _check_queue(queue: EmbeddingQueue, features: Tensor, num_classes: int) -> None:
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(
            f"queue must be an EmbeddingQueue, got {type(queue).__name__}; for a tensor [C, K, D] use"
            " hpcloss.compat.contrastiveseg.PixelContrastLoss"
        )
    expected, got = (num_classes, features.shape[1]), (queue.num_classes, queue.dim)
    if got != expected:
        raise ValueError(f"queue must have (num_classes, dim) = {expected}, got {got}")
    if queue.embeddings.device != features.device:
        raise ValueError(f"queue must be on {features.device}, as features, got {queue.embeddings.device}")
