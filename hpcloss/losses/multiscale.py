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
    """Patch-level and pixel-level contrast of two branches; equations and arguments in `MultiscaleContrastLoss`."""
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
        backend: "auto", "dense", "blockwise" or "triton".

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
        return unchecked(multiscale_contrast_loss)(features1, features2, labels, **self.options)


def _classes(
    features: Tensor, labels: Tensor | None, patch_positives: str, num_classes: int | None
) -> tuple[int, Tensor]:
    """The number of classes and the label of each pixel; without labels all pixels are of one class."""
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
    """Mean feature of the pixels of each patch [P, D] that take part, image by image, and how many of each class."""
    dims = features.dim() - 2
    grid = Grid(features.shape[0], tuple(features.shape[2:]), (size,) * dims, True)
    plan = class_sort(labels, grid, ignore_index=ignored, num_classes=num_classes)
    rows = pack(features, plan.order, plan.live(), normalize=False, permutation=True, backend=backend)
    means = segment_mean(rows, plan.offsets[::num_classes].contiguous())
    return means, plan.offsets.diff().view(-1, num_classes)


def _same_patch(present: Tensor, images: int) -> Pairs:
    """Each patch of one branch with the patches of its image in the other; its positive is the patch itself."""
    number = torch.arange(present.numel(), device=present.device)
    image = number // max(present.numel() // images, 1)
    rows = class_sort(torch.where(present, 0, -1), image, images, num_classes=1)
    return paired(rows.against(rows), number)
