"""Local contrast against class means (Chaitanya et al.)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcloss.checks import IGNORED
from hpcloss.functional.local import local_contrast_loss
from hpcloss.losses.base import Loss


class LocalContrastLoss(Loss):
    r"""Pixels contrasted with the class means of their image and, with partners, of a second one.

        L_i = log Σ_{m∈K(i)} e^{cos(z_i, m) / temperature} - mean_{m∈K(i) of i's class} cos(z_i, m) / temperature

    K(i): the mean embedding of every foreground class that is present in i's image (intra), and those of the image's
    partner (inter). Means are taken over all pixels of the class in the image, before normalising, and differentiated.

    Source: Chaitanya et al., "Local contrastive loss with pseudo-label based self-training for semi-supervised medical
    image segmentation" (MedIA 2023). The mean over anchors is half of their loss of an image pair in the inter form,
    where they add both positives' terms, and weighs all pairs alike: their code divides the running sum at every pair,
    which leaves almost all weight on the last one.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        num_classes: labels outside [0, num_classes) are ignored.
        samples_per_class: anchors drawn per class and image, without replacement; None: all pixels.
        background: label that is neither anchor nor key; None: every class takes part.
        ignore_index: label or labels of pixels that take no part.
        normalize: L2-normalise features and means; rows of norm up to 1e-12 become zero and get no gradient. False: the
            inner product takes the place of the cosine.
        reduction: "mean" over anchors, "class" (mean of class means), "sum", or "none" (a map [B, *S], 0 elsewhere).
        gather: reduce over the anchors of every rank of a distributed run; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".

    Every anchor counts, its own class mean being positive; the only class of an image without partner has loss 0. No
    anchor: 0, joined to the graph. Raises ValueError for shapes and hyper-parameters, TypeError for dtypes,
    NotImplementedError for a backend that cannot run; never for data. Differentiating twice raises.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        num_classes: int,
        samples_per_class: int | None = 3,
        background: int | None = 0,
        ignore_index: int | Sequence[int] = IGNORED,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            local_contrast_loss,
            temperature=temperature, num_classes=num_classes, samples_per_class=samples_per_class,
            background=background, ignore_index=ignore_index, normalize=normalize, reduction=reduction, gather=gather,
            check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, labels: Tensor, partner: Tensor | None = None) -> Tensor:
        """features [B, D, *S], any float dtype and strides; labels [B, *S] or [B, 1, *S], resized by nearest neighbour.

        partner [B]: image partner[i] of the batch is the second one of image i. An image that is its own partner, or
        whose partner is no image of the batch (-1), has its own means alone.
        """
        return local_contrast_loss(features, labels, partner, **self.options)
