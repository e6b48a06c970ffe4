"""Local contrast: sampled pixels against the class means of their image and of a partner (Chaitanya et al.)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    check_used,
    checked,
    count,
    integers,
    labels_of_map,
    labels_of_vectors,
)
from hpcloss.distributed import has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce
from hpcloss.functional.contrast import Contrast
from hpcloss.pack import Rows, pack
from hpcloss.partition import class_sort, from_offsets_against
from hpcloss.regions import Grid, region_shape
from hpcloss.sampling import sample
from hpcloss.segments import segment_mean


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
    labels, num_classes = labels_of_map(features, labels), count("num_classes", num_classes)
    if partner is not None:
        partner = labels_of_vectors("partner", features, partner)
    backend, gather = resolve(backend, features), has_peers(gather)
    flat, spatial = labels.reshape(-1), tuple(labels.shape[1:])
    # Background pixels are neither anchors nor part of a key: to this loss they are ignored.
    away = integers("ignore_index", ignore_index) + (() if background is None else integers("background", background))
    grid = Grid(labels.shape[0], spatial, region_shape(None, spatial), per_image=True)
    order, offsets, _ = class_sort(flat, grid, ignore_index=away, num_classes=num_classes)
    if check_finite:
        check_used(temperature=temperature)
        check_used(order, offsets[-1:], features=features)
    pixels = pack(features, order, offsets[-1:], normalize=False, permutation=True, backend=backend)
    means = segment_mean(pixels, offsets, backend=backend).view(-1, num_classes, features.shape[1])
    present = (offsets.diff() > 0).view(-1, num_classes)
    keys, key_offsets = _keys(means, present, None if flat.numel() == 0 else partner, normalize, backend)

    if samples_per_class is not None and flat.numel():
        most = min(count("samples_per_class", samples_per_class), math.prod(spatial))
        order, offsets = sample(order, offsets, most, num_pixels=flat.numel())
    whole = samples_per_class is None
    rows = pack(features, order, offsets[-1:], normalize=normalize, permutation=whole, backend=backend)
    pairs = from_offsets_against(order, offsets, key_offsets, num_classes)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    loss, counted = Contrast(rows, "all", 0.0, 0.0, scale, bound, True, backend)(pairs, keys)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


def _keys(means: Tensor, present: Tensor, partner: Tensor | None, normalize: bool, backend: str) -> tuple[Rows, Tensor]:
    """The keys of every image, sorted by class, and the offsets of (image, class) [B * C + 1].

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
    order, offsets, _ = class_sort(labels, image, images, num_classes=num_classes)
    rows = keys.reshape(-1, dim)
    return pack(rows, order, offsets[-1:], normalize=normalize, permutation=True, backend=backend), offsets
