"""Contrast of sampled pixels of a batch, with an optional memory of past ones (ContrastiveSeg)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcloss.checks import IGNORED
from hpcloss.functional.pixel import pixel_contrast_loss
from hpcloss.losses.base import Loss
from hpcloss.memory import EmbeddingQueue


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
        backend: "auto", "blockwise" or "triton".

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
        return pixel_contrast_loss(features, labels, predictions, queue, **self.options)
