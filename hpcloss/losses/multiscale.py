"""Contrast of two branches at several scales: patches and pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcloss.checks import IGNORED
from hpcloss.functional.multiscale import multiscale_contrast_loss
from hpcloss.losses.base import Loss


class MultiscaleContrastLoss(Loss):
    r"""Contrast of two branches' feature maps: of patches, at one or several sizes, and of pixels.

        loss = patch_weight · mean over sizes of L_patch + pixel_weight · L_pixel,   each a mean over its anchors of
        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    l_ij = cosine / temperature. The embedding of a patch is the mean of its pixels. At pixel level P(i) and N(i) are
    the other pixels of the batch, in both branches, with i's label and with another one.

    Source: Wu et al., multiscale contrastive learning and cross-supervision (EMBC 2023). A reconstruction: only the
    abstract was available. The patches follow Zhao et al., "CLCC" (ISBI 2022), whose code divides by the L1 norm where
    cosines are meant and contrasts one branch alone; here it is the L2 norm and both branches.

    Args:
        patch_size: pixels of the feature map per patch and axis, or several such sizes; remainders are smaller patches.
        temperature: positive number, or a 0-dim tensor (learnable).
        patch_positives: "instance": a patch's positive is the same patch in the other branch, its negatives are the
            other patches of that image there, keys without gradient. "majority": patches have the commonest label of
            their pixels (the lowest of several), and all patches of the batch, in both branches, are contrasted by it.
        patch_weight, pixel_weight: weights of the two levels.
        num_classes: needed with labels; labels outside [0, num_classes) are ignored.
        samples_per_class: draw at most this many pixels per class for the pixel level; None: all.
        ignore_index: label or labels of pixels that take no part, in patches neither.
        normalize: L2-normalise pixels and patches; rows of norm up to 1e-12 become zero and get no gradient. False: the
            inner product takes the place of the cosine.
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".

    Every class has anchors, the background as well. An anchor counts if it has a positive and a negative. No counted
    anchor: 0, joined to the graph. Raises ValueError for shapes and hyper-parameters, TypeError for dtypes,
    NotImplementedError for a backend that cannot run; never for data. Differentiating twice raises.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int] = 8,
        temperature: float | Tensor = 0.1,
        *,
        patch_positives: str = "instance",
        patch_weight: float = 1.0,
        pixel_weight: float = 1.0,
        num_classes: int | None = None,
        samples_per_class: int | None = 64,
        ignore_index: int | Sequence[int] = IGNORED,
        normalize: bool = True,
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            multiscale_contrast_loss,
            patch_size=patch_size, temperature=temperature, patch_positives=patch_positives, patch_weight=patch_weight,
            pixel_weight=pixel_weight, num_classes=num_classes, samples_per_class=samples_per_class,
            ignore_index=ignore_index, normalize=normalize, gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, features1: Tensor, features2: Tensor, labels: Tensor | None = None) -> Tensor:
        """features1, features2 [B, D, *S], the two branches; labels [B, *S] or [B, 1, *S], of the images or agreed on
        by the branches, resized by nearest neighbour. Without labels there is the patch level alone."""
        return multiscale_contrast_loss(features1, features2, labels, **self.options)
