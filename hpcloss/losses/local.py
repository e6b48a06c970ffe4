"""Local contrast: sampled pixels against class means of their image and of a partner (Chaitanya et al.)."""

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
    """The function of `LocalContrastLoss`: the inputs of its `forward`, then its options."""
    labels = labels_of_map(features, labels)
    if partner is not None:
        partner = labels_of_vectors("partner", features, partner)
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
    spatial = tuple(labels.shape[1:])
    # Background pixels are neither anchors nor part of a mean, so they are ignored.
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
    """Contrast of sampled pixels with the class means of their image and of a partner image.

        L_i = log Σ_{m∈K(i)} e^{cos(z_i, m) / τ} - mean_{m∈K(i) of i's class} cos(z_i, m) / τ

    z_i is the embedding of pixel i and τ the temperature. K(i), the keys, are the mean embeddings of the classes in i's
    image and, with a partner, of the classes in the partner image. A mean is taken over all pixels of the class in the
    image, before normalisation. It is differentiated.

    The loss pulls a pixel to the mean of its class and pushes it away from the means of other classes. Every anchor
    counts. An anchor has loss 0 if the mean of its class is the only key. If there is no anchor, the loss is 0 with
    zero gradients.

    Source: Chaitanya et al., "Local contrastive loss with pseudo-label based self-training for semi-supervised medical
    image segmentation" (MedIA 2023). The mean over anchors is half of the paper's loss of an image pair in the inter
    form, where it adds the terms of both positives. All pairs weigh alike; the authors' code divides a running sum at
    every pair, which leaves nearly all weight on the last pair.

    Args:
        temperature: τ. A positive number, or a tensor with one element (learnable).
        num_classes: Number of classes C. Labels outside [0, C) are ignored.
        samples_per_class: Sample at most this many anchors per class and image, without replacement, with torch's
            generator. None: all pixels.
        background: Label of pixels that are neither anchors nor part of a mean. None: every class takes part.
        ignore_index: Label or labels of pixels that are neither anchors nor part of a mean. Default: -100, -1 and 255.
        normalize: Divide each embedding and mean by its L2 norm. Rows with a norm of at most 1e-12 become zero and get
            no gradient. False: take inner products instead of cosines.
        reduction: "mean" over anchors, "class" (mean of class means), "sum", or "none" (a map `[B, *S]` with 0
            elsewhere).
        gather: On several processes, reduce over the anchors of all ranks. Keys stay those of the rank
            (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> features = torch.randn(2, 16, 32, 32, requires_grad=True)
        >>> labels = torch.randint(4, (2, 32, 32))
        >>> loss = hpcloss.LocalContrastLoss(num_classes=4)(features, labels, partner=torch.tensor([1, 0]))
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([2, 16, 32, 32])
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
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour.
            partner: `[B]`, integers. Image `partner[i]` of the batch is the partner of image i. Values outside [0, B),
                or i itself: image i has no partner. None: no image has one.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`.
        """
        return unchecked(local_contrast_loss)(features, labels, partner, **self.options)


def _keys(
    means: Tensor, present: Tensor, partner: Tensor | None, normalize: bool, backend: str
) -> tuple[Rows, ClassRows]:
    """The keys of every image, and the rows of each image and class among them.

    Images share no key: the means of a partner are copied.

    Args:
        means: [B, C, D].
        present: Whether the class is in the image [B, C].
    """
    images, num_classes, dim = means.shape
    own = torch.arange(images, device=means.device)
    labels = torch.where(present, torch.arange(num_classes, device=means.device), -1)[:, None]
    keys = means[:, None]
    if partner is not None:
        met = (partner >= 0) & (partner < images) & (partner != own)
        partner = torch.where(met, partner, own)
        # An embedding, because the gradients of other gathers add up in no fixed order.
        theirs = torch.nn.functional.embedding(partner, means.flatten(1)).view(images, 1, num_classes, dim)
        keys = torch.cat([keys, theirs], 1)
        labels = torch.cat([labels, torch.where(met[:, None, None], labels[partner], -1)], 1)
    image = own[:, None, None].expand(labels.shape)
    rows = class_sort(labels, image, images, num_classes=num_classes)
    vectors = keys.reshape(-1, dim)
    return pack(vectors, rows.order, rows.live(), normalize=normalize, permutation=True, backend=backend), rows
