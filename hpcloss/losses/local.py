"""Local contrast: sampled pixels against the class means of their image and of a partner (Chaitanya et al.)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hpcloss.checks import check_used
from hpcloss.distributed import has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce
from hpcloss.plan.labels import IGNORED, labels_of_map, labels_of_vectors
from hpcloss.plan.partition import ClassRows, class_sort
from hpcloss.plan.regions import Grid, region_shape
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale
from hpcloss.primitives.segment_mean import segment_mean


@checked
def local_contrast_loss(
    features: Tensor,
    labels: Tensor,
    partner: Tensor | None = None,
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
) -> Tensor:
    """Contrast of pixels with class means of their image and its partner; see `LocalContrastLoss`."""
    labels = labels_of_map(features, labels)
    if partner is not None:
        partner = labels_of_vectors("partner", features, partner)
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
    spatial = tuple(labels.shape[1:])
    # Background pixels are neither anchors nor part of a key: to this loss they are ignored.
    away = ignored if background is None else (*ignored, background)
    images = Grid(labels.shape[0], spatial, region_shape(None, spatial), per_image=True)
    pixels = class_sort(labels, images, ignore_index=away, num_classes=num_classes)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pixels.order, pixels.live(), features=features)
    packed = pack(features, pixels.order, pixels.live(), normalize=False, permutation=True, backend=backend)
    means = segment_mean(packed, pixels.offsets).view(-1, num_classes, features.shape[1])
    present = (pixels.offsets.diff() > 0).view(-1, num_classes)
    keys, of_keys = _keys(means, present, None if labels.numel() == 0 else partner, normalize, packed.backend)

    anchors = pixels.sampled(samples_per_class, math.prod(spatial))
    whole = samples_per_class is None
    rows = pack(features, anchors.order, anchors.live(), normalize=normalize, permutation=whole, backend=packed.backend)
    pairs, scale = anchors.against(of_keys), Scale.of(temperature, rows, normalize)
    loss, counted = contrast(rows, pairs, keys=keys, scale=scale, denominator="all")
    return reduce(loss, counted, reduction, pairs.order, labels, gather=has_peers(gather))


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
        backend: "auto", "dense", "blockwise" or "triton".

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
        return unchecked(local_contrast_loss)(features, labels, partner, **self.options)


def _keys(
    means: Tensor, present: Tensor, partner: Tensor | None, normalize: bool, backend: str
) -> tuple[Rows, ClassRows]:
    """The keys of every image, and where those of each image and class are.

    means [B, C, D], present [B, C]. No two images share a key: the means of a partner are copied to who meets them.
    """
    images, num_classes, dim = means.shape
    own = torch.arange(images, device=means.device)
    labels = torch.where(present, torch.arange(num_classes, device=means.device), -1)[:, None]
    keys = means[:, None]
    if partner is not None:
        met = (partner >= 0) & (partner < images) & (partner != own)
        partner = torch.where(met, partner, own)
        # An embedding: other gathers add up their gradients in no particular order.
        theirs = torch.nn.functional.embedding(partner, means.flatten(1)).view(images, 1, num_classes, dim)
        keys = torch.cat([keys, theirs], 1)
        labels = torch.cat([labels, torch.where(met[:, None, None], labels[partner], -1)], 1)
    image = own[:, None, None].expand(labels.shape)
    rows = class_sort(labels, image, images, num_classes=num_classes)
    vectors = keys.reshape(-1, dim)
    return pack(vectors, rows.order, rows.live(), normalize=normalize, permutation=True, backend=backend), rows
