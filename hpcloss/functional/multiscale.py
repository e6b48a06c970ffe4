"""Contrast of two branches at several scales: patches and pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    check_same_maps,
    check_sizes,
    check_used,
    checked,
    count,
    integers,
    labels_of_map,
)
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce
from hpcloss.functional.contrast import Contrast
from hpcloss.pack import Rows, pack
from hpcloss.partition import Pairs, class_sort, from_offsets, from_offsets_against, paired
from hpcloss.regions import Grid
from hpcloss.sampling import sample
from hpcloss.segments import segment_mean
from hpcloss.sorting import is_ignored


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
    if labels is None:
        if patch_positives == "majority":
            raise ValueError("patch_positives='majority' needs labels, got None")
        classes, pixels = 1, labels_of_map(features1, torch.zeros_like(features1[:, 0], dtype=torch.int64))
    else:
        if num_classes is None:
            raise ValueError("labels need num_classes, got None")
        classes, pixels = count("num_classes", num_classes), labels_of_map(features1, labels)
    ignored = integers("ignore_index", ignore_index) if labels is not None else ()
    backend, gather = resolve(backend, features1), has_peers(gather)
    if check_finite:
        check_used(temperature=temperature)
        used = (~is_ignored(pixels, ignored, classes)).reshape(-1).nonzero().view(-1)
        check_used(used, features1=features1, features2=features2)
    features, pixels = torch.cat([features1, features2]), torch.cat([pixels, pixels])

    def contrast(rows: Rows, pairs: Pairs, keys: Rows | None = None, labels: Tensor | None = None) -> Tensor:
        if labels is not None and gather:
            pairs, keys = gather_keys(rows, pairs, labels.reshape(-1)[pairs.order])
        scale, bound = inverse_temperature(temperature, rows, normalize)
        loss, counted = Contrast(rows, "own", 0.0, 0.0, scale, bound, True, backend)(pairs, keys)
        return reduce(loss, counted, "mean", gather=gather)

    scales = []
    for size in check_sizes("patch_size", patch_size):
        patches, votes = _patches(features, pixels, size, classes, ignored, backend)
        present = votes.sum(1) > 0
        if patch_positives == "majority":
            majority = torch.where(present, votes.argmax(1), -1)
            order, offsets, _ = class_sort(majority, num_classes=classes)
            rows = pack(patches, order, offsets[-1:], normalize=normalize, permutation=True, backend=backend)
            scales.append(contrast(rows, from_offsets(order, offsets, classes, False), labels=majority))
            continue
        pairs = _same_patch(present[: len(present) // 2], max(features1.shape[0], 1))
        branch1, branch2 = [
            pack(half, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
            for half in patches[: 2 * pairs.order.numel()].chunk(2)
        ]
        scales.append((contrast(branch1, pairs, branch2.detach()) + contrast(branch2, pairs, branch1.detach())) / 2)
    loss = patch_weight * torch.stack(scales).mean()
    if labels is None:
        return loss
    order, offsets, _ = class_sort(pixels, ignore_index=ignored, num_classes=classes)
    if samples_per_class is not None and pixels.numel():
        most = min(count("samples_per_class", samples_per_class), pixels.numel())
        order, offsets = sample(order, offsets, most, num_pixels=pixels.numel())
    whole = samples_per_class is None
    rows = pack(features, order, offsets[-1:], normalize=normalize, permutation=whole, backend=backend)
    return loss + pixel_weight * contrast(rows, from_offsets(order, offsets, classes, False), labels=pixels)


def _patches(
    features: Tensor, labels: Tensor, size: int, num_classes: int, ignored: tuple[int, ...], backend: str
) -> tuple[Tensor, Tensor]:
    """Mean feature of the pixels of each patch [P, D] that take part, image by image, and how many of each class."""
    dims = features.dim() - 2
    grid = Grid(features.shape[0], tuple(features.shape[2:]), (size,) * dims, True)
    order, offsets, _ = class_sort(labels, grid, ignore_index=ignored, num_classes=num_classes)
    rows = pack(features, order, offsets[-1:], normalize=False, permutation=True, backend=backend)
    means = segment_mean(rows, offsets[::num_classes].contiguous(), backend=backend)
    return means, offsets.diff().view(-1, num_classes)


def _same_patch(present: Tensor, images: int) -> Pairs:
    """Each patch of one branch with the patches of its image in the other; its positive is the patch itself."""
    number = torch.arange(present.numel(), device=present.device)
    image = number // max(present.numel() // images, 1)
    order, offsets, _ = class_sort(torch.where(present, 0, -1), image, images, num_classes=1)
    return paired(from_offsets_against(order, offsets, offsets, 1), number)
