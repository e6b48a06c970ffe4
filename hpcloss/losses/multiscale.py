"""Contrast of two branches at several scales: patches and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hpcloss.checks import check_same_maps, check_used
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce
from hpcloss.plan.labels import IGNORED, is_ignored, labels_of_map
from hpcloss.plan.partition import Pairs, class_sort, paired
from hpcloss.plan.regions import Grid
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale
from hpcloss.primitives.segment_mean import segment_mean


@checked
def multiscale_contrast_loss(
    features1: Tensor,
    features2: Tensor,
    labels: Tensor | None = None,
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
) -> Tensor:
    """The function of `MultiscaleContrastLoss`: the inputs of its `forward`, then its options."""
    check_same_maps("features2", features2, "features1", features1)
    classes, pixels = _classes(features1, labels, patch_positives, num_classes)
    ignored = cast(tuple[int, ...], ignore_index) if labels is not None else ()
    gather = has_peers(gather)
    if check_finite:
        check_used(temperature=temperature)
        used = (~is_ignored(pixels, ignored, classes)).reshape(-1).nonzero().view(-1)
        check_used(used, features1=features1, features2=features2)
    features, pixels = torch.cat([features1, features2]), torch.cat([pixels, pixels])

    def mean_loss(rows: Rows, pairs: Pairs, keys: Rows | None = None, labels: Tensor | None = None) -> Tensor:
        if labels is not None and gather:
            pairs, keys = gather_keys(rows, pairs, labels.reshape(-1)[pairs.order])
        loss, counted = contrast(rows, pairs, keys=keys, scale=Scale.of(temperature, rows, normalize))
        return reduce(loss, counted, "mean", gather=gather)

    scales = []
    for size in cast(tuple[int, ...], patch_size):
        patches, votes = _patches(features, pixels, size, classes, ignored, backend)
        present = votes.sum(1) > 0
        if patch_positives == "majority":
            majority = torch.where(present, votes.argmax(1), -1)
            plan = class_sort(majority, num_classes=classes)
            rows = pack(patches, plan.order, plan.live(), normalize=normalize, permutation=True, backend=backend)
            scales.append(mean_loss(rows, plan.pairs(), labels=majority))
            continue
        pairs = _same_patch(present[: len(present) // 2], max(features1.shape[0], 1))
        branch1, branch2 = [
            pack(half, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
            for half in patches[: 2 * pairs.order.numel()].chunk(2)
        ]
        scales.append((mean_loss(branch1, pairs, branch2.detach()) + mean_loss(branch2, pairs, branch1.detach())) / 2)
    loss = patch_weight * torch.stack(scales).mean()
    if labels is None:
        return loss
    plan = class_sort(pixels, ignore_index=ignored, num_classes=classes).sampled(samples_per_class)
    whole = samples_per_class is None
    rows = pack(features, plan.order, plan.live(), normalize=normalize, permutation=whole, backend=backend)
    return loss + pixel_weight * mean_loss(rows, plan.pairs(), labels=pixels)


class MultiscaleContrastLoss(Loss):
    """Contrast of two branches' feature maps, of patches and of pixels.

        loss = patch_weight · mean over patch sizes of L_patch + pixel_weight · L_pixel
        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    L_patch and L_pixel are means of L_i over the counted anchors. l_ij is the cosine of rows i and j, divided by the
    temperature; a row is a pixel, or a patch with the mean embedding of its pixels. At the pixel level P(i), the
    positives of anchor i, are the other pixels of the batch, in both branches, with its label. N(i), the negatives, are
    the pixels with another label. At the patch level `patch_positives` defines P(i) and N(i).

    The loss pulls an anchor to its positives and pushes it away from its negatives. An anchor counts if it has a
    positive and a negative. Every class has anchors, the background too. If no anchor counts, the loss is 0 with zero
    gradients.

    Source: Wu et al., multiscale contrastive learning and cross-supervision (EMBC 2023). This is a reconstruction from
    the abstract. The patches follow Zhao et al., "CLCC" (ISBI 2022), whose code divides by the L1 norm and contrasts
    one branch; here it is the L2 norm and both branches.

    Args:
        patch_size: Side of a patch in pixels of the feature map, or several sizes. Patches at the border may be
            smaller.
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        patch_positives: "instance": the positive of a patch is the same patch in the other branch, and its negatives
            are the other patches of that image there; keys get no gradient. "majority": each patch has the most
            frequent label of its pixels (the lowest of equally frequent ones), and all patches of the batch in both
            branches are contrasted by it.
        patch_weight: Weight of the patch level, at least 0.
        pixel_weight: Weight of the pixel level, at least 0.
        num_classes: Number of classes C, required with labels. Labels outside [0, C) are ignored.
        samples_per_class: Sample at most this many pixels per class for the pixel level. None: all pixels.
        ignore_index: Label or labels of pixels that take no part, in patches either. Default: -100, -1 and 255.
        normalize: Divide each pixel and patch embedding by its L2 norm. Rows with a norm of at most 1e-12 become zero
            and get no gradient. False: l_ij is the inner product over the temperature.
        gather: On several processes, contrast with the rows of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> branch1, branch2 = torch.randn(2, 2, 16, 32, 32, requires_grad=True)
        >>> labels = torch.randint(4, (2, 32, 32))
        >>> contrast = hpcloss.MultiscaleContrastLoss(patch_size=(4, 8), num_classes=4)
        >>> contrast(branch1, branch2, labels).shape
        torch.Size([])
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
        """Compute the loss of two feature maps.

        Args:
            features1: Feature map of the first branch `[B, D, *S]`, any float dtype; S has one or more axes.
            features2: Feature map of the second branch, with the shape and dtype of the first.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats, of the images or agreed on by the
                branches. Another resolution is resized by nearest neighbour. None: the patch level alone.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 features).
        """
        return unchecked(multiscale_contrast_loss)(features1, features2, labels, **self.options)


def _classes(
    features: Tensor, labels: Tensor | None, patch_positives: str, num_classes: int | None
) -> tuple[int, Tensor]:
    """The number of classes and the label of each pixel. Without labels all pixels are of one class."""
    if labels is None:
        if patch_positives == "majority":
            raise ValueError("labels must be given with patch_positives='majority', got None")
        return 1, labels_of_map(features, torch.zeros_like(features[:, 0], dtype=torch.int64))
    if num_classes is None:
        raise ValueError("num_classes must be given with labels, got None")
    return num_classes, labels_of_map(features, labels)


def _patches(
    features: Tensor, labels: Tensor, size: int, num_classes: int, ignored: tuple[int, ...], backend: str
) -> tuple[Tensor, Tensor]:
    """Mean feature [P, D] of each patch, image by image, and its number of pixels of each class [P, C]."""
    dims = features.dim() - 2
    grid = Grid(features.shape[0], tuple(features.shape[2:]), (size,) * dims, True)
    plan = class_sort(labels, grid, ignore_index=ignored, num_classes=num_classes)
    rows = pack(features, plan.order, plan.live(), normalize=False, permutation=True, backend=backend)
    means = segment_mean(rows, plan.offsets[::num_classes].contiguous())
    return means, plan.offsets.diff().view(-1, num_classes)


def _same_patch(present: Tensor, images: int) -> Pairs:
    """Patches of one branch against those of their image in the other branch. The positive is the same patch."""
    number = torch.arange(present.numel(), device=present.device)
    image = number // max(present.numel() // images, 1)
    rows = class_sort(torch.where(present, 0, -1), image, images, num_classes=1)
    return paired(rows.against(rows), number)
