"""Contrast of sampled pixels of a batch, with an optional memory of past pixels (ContrastiveSeg)."""

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
    """The function of `PixelContrastLoss`: the inputs of its `forward`, then its options."""
    labels = labels_of_map(features, labels)
    wrong = None if predictions is None else labels_of_map(features, predictions, "predictions") != labels
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
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
    counted = torch.minimum(positives, negatives) > 0  # the loss of other anchors is 0: no mean, or log(1 + 0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


class PixelContrastLoss(Loss):
    """Contrast of sampled pixels across the images of a batch (ContrastiveSeg).

        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    l_ij is the cosine of pixels i and j, divided by the temperature. P(i), the positives of anchor i, are the other
    sampled pixels of the batch with its label. N(i), the negatives, are the sampled pixels with another label. With a
    queue its embeddings are further positives and negatives.

    The loss samples some pixels of each class of each image: they are the anchors and the keys. It pulls an anchor to
    its positives and pushes it away from its negatives. An anchor counts if it has a positive and a negative. If no
    anchor counts, the loss is 0 with zero gradients.

    Source: Wang et al., "Exploring cross-image pixel contrast for semantic segmentation" (ICCV 2021, ContrastiveSeg).
    It is also the loss of UGPCL (Wang et al., IJCAI 2022): give uncertain pixels an ignored label, and fill the memory
    with `EmbeddingQueue.enqueue_means`. Five things differ from the authors' code:

    * The factor temperature / base temperature is left out. It is 1 at the code's temperature of 0.07.
    * A class with few pixels is taken whole. The code drops it.
    * `samples_per_class` is fixed. The code divides a budget by the number of classes in the batch.
    * The keys of a memory join those of the batch. In the code they replace them.
    * Defects of the code's memory are left out: the mask of the anchor itself over unrelated keys, zero rows as keys of
      class 0, and pixels stored under another class.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        num_classes: Number of classes C. Labels outside [0, C) are ignored.
        samples_per_class: Sample at most this many pixels per class and image, with torch's generator. With
            `predictions` half of them are wrongly predicted, if there are enough. None: all pixels.
        background: Label of pixels that are keys and never anchors. None, as published: every class has anchors.
        ignore_index: Label or labels of pixels that are neither anchors nor keys. A queue's embeddings of such a class
            are no keys either. Default: -100, -1 and 255.
        normalize: Divide each embedding by its L2 norm. Embeddings with a norm of at most 1e-12 become zero and get no
            gradient. False: l_ij is the inner product over the temperature. A queue always holds unit rows.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum", or "none" (a map `[B, *S]` with 0
            where no anchor counts).
        gather: On several processes, contrast with the sampled pixels of all ranks (`hpcloss.distributed`).
        check_labels: Raise ValueError for a label outside [0, num_classes) that is not in `ignore_index`. Synchronises
            with the device.
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice, or the queue has changed before backward.

    Examples:
        >>> import torch, hpcloss
        >>> features, labels = torch.randn(2, 16, 32, 32), torch.randint(4, (2, 32, 32))
        >>> contrast = hpcloss.PixelContrastLoss(num_classes=4, samples_per_class=50, reduction="none")
        >>> loss = contrast(features, labels)  # of 50 pixels of each of 4 classes of 2 images
        >>> loss.shape, int((loss > 0).sum())
        (torch.Size([2, 32, 32]), 400)
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
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour.
            predictions: Predicted classes, shaped like the labels, for example `logits.argmax(1)`. Pixels with another
                prediction than label are hard. None: all pixels are alike.
            queue: Embeddings of past batches as further keys, without gradient. Write to it after backward.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`.
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
    """The pairs among the sampled pixels of a label map [B, *S], as one region."""
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
