"""Contrast of two branches at several scales, dense."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, reduce, unit
from hpcloss.reference.region import cells, contrast, labels_at


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
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
) -> Tensor:
    """Contrast of two branches: of patches, averaged over patch sizes, and of pixels.

        loss = patch_weight * mean over sizes of L_patch + pixel_weight * L_pixel,   each a mean over its anchors of
        L_i = 1/|P(i)| Σ_{j in P(i)} [ log( e^{l_ij} + Σ_{n in N(i)} e^{l_in} ) - l_ij ]

    A patch is a cell of a grid of one image in one branch, its embedding the mean of its pixels that take part; a patch
    without any does not exist. Patches, "instance": P(i) is the same patch in the other branch, N(i) the other patches
    of that image there, keys are constants. Patches, "majority": P(i) and N(i) are the other patches, of both branches
    and all images, with the commonest label of i's pixels (the lowest of several) and with another one. Pixels: the
    same with pixels and their labels; no labels, no such term. Counted: at least one positive and one negative.

    Wu et al., EMBC 2023. No code and no printed equation was available: this is a reconstruction from the abstract,
    "instance" after the patch contrast of CLCC (Zhao et al., ISBI 2022) with L2 norms.

    features1, features2 [B, D, *S]; labels [B, *S'] or [B, 1, *S'], those outside [0, num_classes) ignored.
    """
    (batch, dim, *spatial), classes = features1.shape, num_classes or 1
    x = torch.cat([features1, features2]).movedim(1, -1).reshape(-1, dim)
    y, valid = pixel_labels(x, features1, labels, classes, ignore_index)
    x = torch.where(valid[:, None], x, 0.0)

    def mean(s: Tensor, pair: Tensor, positive: Tensor) -> Tensor:
        loss, counted = contrast(s, pair & positive, pair & ~positive, temperature, 0.0, 0.0, "own", True)
        return reduce(loss, counted, "mean")

    def supervised(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
        pair = valid[:, None] & valid & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        x = unit(x, normalize)
        return mean(x @ x.T, pair, y[:, None] == y)

    scales = []
    for size in (patch_size,) if isinstance(patch_size, int) else patch_size:
        member, number = members(x, valid, spatial, size, batch)
        pixels = member.sum(1)
        patches, exists = member @ x / pixels.clamp(min=1)[:, None], pixels > 0
        if patch_positives == "majority":
            votes = torch.stack([member[:, y == c].sum(1) for c in range(classes)], 1)
            scales.append(supervised(patches, votes.argmax(1), exists))
            continue
        q1, q2 = unit(patches, normalize).chunk(2)
        image, exists = torch.arange(batch, device=x.device).repeat_interleave(number), exists[: batch * number]
        pair = exists[:, None] & exists & (image[:, None] == image)
        same = torch.eye(len(image), dtype=torch.bool, device=x.device)
        scales.append((mean(q1 @ q2.detach().T, pair, same) + mean(q2 @ q1.detach().T, pair, same)) / 2)
    loss = patch_weight * torch.stack(scales).mean()
    return loss if labels is None else loss + pixel_weight * supervised(x, y, valid)


def pixel_labels(
    x: Tensor, features: Tensor, labels: Tensor | None, classes: int, ignore_index: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The label of each pixel of both branches, and whether it takes part; without labels all are of one class."""
    if labels is None:
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return y, torch.ones_like(y, dtype=torch.bool)
    labels = labels.squeeze(1) if labels.dim() == features.dim() else labels
    y = labels_at(labels, features.shape[2:]).reshape(-1).repeat(2)
    return y, is_valid(y, ignore_index) & (y >= 0) & (y < classes)


def members(x: Tensor, valid: Tensor, spatial: Sequence[int], size: int, batch: int) -> tuple[Tensor, int]:
    """Which pixels take part in each patch of both branches, as numbers 0 and 1; and the patches of one image."""
    cell = cells(spatial, [size] * len(spatial)).to(x.device)
    number = int(cell.max()) + 1 if cell.numel() else 1
    patch = cell.repeat(2 * batch) + torch.arange(2 * batch, device=x.device).repeat_interleave(len(cell)) * number
    return ((torch.arange(2 * batch * number, device=x.device)[:, None] == patch) & valid).to(x.dtype), number
