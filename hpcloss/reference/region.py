"""Region-based pixel contrast, dense."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, lse, reduce, softmax, softplus, unit


def contrast(
    s: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float | Tensor,
    hardness: float,
    discount: float,
    denominator: str,
    detach_weights: bool,
    multiplicity: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss [N] of every row of the similarities `s` [N, M], and whether it counts; equations in `region_phpc_loss`.

    `multiplicity` is how often each key is summed in a denominator.
    """
    logit = s / temperature
    weight = softmax(-hardness * s, positive)
    if detach_weights:
        weight = weight.detach()
    counted = positive.any(-1)
    if denominator == "all":
        loss = lse(logit, positive | negative) + math.log(multiplicity) - (weight * logit).sum(-1)
    else:
        counted = counted & negative.any(-1)
        negatives = lse(logit, negative) + math.log(multiplicity)
        if denominator == "negatives":
            loss = negatives - (weight * logit).sum(-1)
        else:  # log(e^d + e^lN) - l as softplus(lN - d) + (d - l), which keeps the digits of a small loss
            d = logit - discount * s
            loss = (weight * (softplus(negatives.unsqueeze(-1) - d) - discount * s)).sum(-1)
    return torch.where(counted, loss, 0.0), counted


def per_axis(size: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    """A size as one number for each axis."""
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sizes) != dims or min(sizes, default=1) < 1:
        raise ValueError(f"{name} must be a positive integer, or one for each of the {dims} axes, got {size}")
    return sizes


def cells(spatial: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Number of the grid cell each pixel lies in, flat in row-major order; cells at the far edge may be smaller."""
    cell = torch.zeros(tuple(spatial), dtype=torch.int64)
    for axis, (length, size) in enumerate(zip(spatial, sizes, strict=True)):
        along = (torch.arange(length) // size).reshape([-1 if a == axis else 1 for a in range(len(spatial))])
        cell = cell * -(-length // size) + along
    return cell.reshape(-1)


def labels_at(labels: Tensor, spatial: Sequence[int]) -> Tensor:
    """Labels [B, *S'] at the resolution `spatial` by nearest neighbour, source = floor(target * S' / S), as int64."""
    labels = labels.to(torch.int64)  # a comparison of uint8 with -1 would otherwise wrap around
    for axis, length in enumerate(spatial, start=1):
        labels = labels.index_select(axis, torch.arange(length, device=labels.device) * labels.shape[axis] // length)
    return labels


def check_denominator(denominator: str, discount: float) -> None:
    """ValueError where there is no such denominator, or none that a discount has a part in."""
    if denominator not in ("own", "all", "negatives"):
        raise ValueError(f"denominator must be own, all or negatives, got {denominator}")
    if discount and denominator != "own":
        raise ValueError(f"discount needs denominator own, got {denominator}")


def regions_and_cells(
    features: Tensor, region_size: int | Sequence[int] | None, local_size: int | Sequence[int] | None, per_image: bool
) -> tuple[Tensor, Tensor | None, int]:
    """The region of each pixel; with `local_size` its small cell as well, and how many of these make a region."""
    batch, spatial = features.shape[0], features.shape[2:]
    whole = tuple(max(length, 1) for length in spatial)
    sizes = whole if region_size is None else per_axis(region_size, len(spatial), "region_size")
    cell = cells(spatial, sizes)
    image = torch.arange(batch).repeat_interleave(cell.numel())
    region = (cell.repeat(batch) + image * cell.numel() * per_image).to(features.device)
    if local_size is None:
        return region, None, 1
    small_sizes = per_axis(local_size, len(spatial), "local_size")
    if region_size is None or any(size % part for size, part in zip(sizes, small_sizes, strict=True)):
        raise ValueError(f"local_size must divide region_size, got {local_size} and {region_size}")
    small = cells(spatial, small_sizes).repeat(batch).to(features.device)
    return region, small, math.prod(size // part for size, part in zip(sizes, small_sizes, strict=True))


def pairs_of(label: Tensor, background: int | None) -> tuple[Tensor, Tensor]:
    """Which pairs are positives, which are negatives. Background is keys only: without a positive it does not count."""
    positive = (label[:, None] == label) & ~torch.eye(len(label), dtype=torch.bool, device=label.device)
    if background is not None:
        positive = positive & (label != background)[:, None]
    return positive, label[:, None] != label


def mean_over_cells(
    cell: Tensor,
    s: Tensor,
    positive: Tensor,
    negative: Tensor,
    of_anchors: Callable[..., tuple[Tensor, Tensor]],
    multiplicity: int,
) -> Tensor:
    """Mean of the contrast of each anchor with the keys of one small cell, over the cells where it counts."""
    parts, number = torch.zeros_like(s[:, 0]), torch.zeros_like(s[:, 0])
    for c in cell.unique():
        inside = cell == c
        part, counts = of_anchors(s, positive & inside, negative & inside, multiplicity)
        parts, number = parts + part, number + counts.to(s.dtype)
    return parts / number.clamp(min=1)


def region_phpc_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 16,
    temperature: float | Tensor = 0.1,
    hardness: float = 1.0,
    *,
    discount: float = 0.0,
    local_size: int | Sequence[int] | None = None,
    denominator: str = "own",
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    detach_weights: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Pixel-level contrast inside regions of the map, each anchor pulled hardest by its least similar positives.

        "own"        L_i = Σ_{j in P(i)} w_ij [ log( e^{l_ij - discount * s_ij} + Σ_{n in N(i)} e^{l_in} ) - l_ij ]
        "all"        L_i = log Σ_{k in P(i) or N(i)} e^{l_ik} - Σ_{j in P(i)} w_ij l_ij
        "negatives"  L_i = log Σ_{n in N(i)} e^{l_in}         - Σ_{j in P(i)} w_ij l_ij
        w_ij = e^{-hardness * s_ij} / Σ_{j' in P(i)} e^{-hardness * s_ij'}, a constant unless detach_weights=False

    P(i): other pixels of the region of i with its label; N(i): those of other labels. Background pixels are keys only.
    Counted: at least one positive and, but for "all", one negative. A region is one grid cell, of all images together
    or of each (`per_image`). With `local_size` a counted anchor adds the mean, over the small cells of its region
    where it counts, of the same L_i with the keys of that cell, each summed Π_axes region_size / local_size times.

    Tang et al., ISBI 2023 and Pattern Recognition 2024 (110020). Their printed equation was not available: this is a
    reconstruction. "own", foreground anchors and regions are those of the authors' code, which weights e^{l_ij} in the
    denominator by e^{-0.1 h_ij} (here `discount` 0.1 at hardness 0, with s_ij for their cross-view h_ij); the weights
    w_ij outside the logarithm are read from the abstract and the figure, `local_size` from the figure alone.

    features [B, D, *S]; labels [B, *S'] or [B, 1, *S']. Returns a scalar, or [B, *S] with reduction="none"; "class" and
    "region" average the means of classes and of regions. ValueError where the hyper-parameters contradict one another.
    """
    check_denominator(denominator, discount)
    batch, dim, *spatial = features.shape
    region, small, multiplicity = regions_and_cells(features, region_size, local_size, per_image)
    y = labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(-1)
    pixels, valid = features.movedim(1, -1).reshape(-1, dim), is_valid(y, ignore_index)

    def of_anchors(s: Tensor, positive: Tensor, negative: Tensor, times: int) -> tuple[Tensor, Tensor]:
        form = temperature, hardness, discount, denominator, detach_weights, times
        return contrast(s, positive, negative, *form)

    loss = torch.zeros_like(pixels[:, 0]) + pixels[:0].sum()  # an empty sum: joined to the graph, whatever the pixels
    counted = torch.zeros_like(valid)
    for r in region[valid].unique():
        here = (valid & (region == r)).nonzero().squeeze(1)
        x, label = unit(pixels[here], normalize), y[here]
        s, (positive, negative) = x @ x.T, pairs_of(label, background)
        value, counts = of_anchors(s, positive, negative, 1)
        if small is not None:  # who counts in a cell counts in its region
            value = value + mean_over_cells(small[here], s, positive, negative, of_anchors, multiplicity)
        loss = loss.index_put((here,), value)
        counted[here] = counts
    loss = reduce(loss, counted, reduction, {"class": y, "region": region})
    return loss.reshape(batch, *spatial) if reduction == "none" else loss


def region_supcon_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 32,
    temperature: float | Tensor = 0.1,
    *,
    local_size: int | Sequence[int] | None = None,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrast inside regions of the map, all positives alike.

        L_i = -1/|P(i)| Σ_{j in P(i)} log( e^{l_ij} / Σ_{k in P(i) or N(i)} e^{l_ik} )

    Hu et al., MICCAI 2021 (arXiv 2109.07407), the blocks of the authors' code: anchors are foreground, background is a
    key. They average the means of the blocks, here reduction="region"; `local_size` is not theirs. Regions, shapes and
    errors as in `region_phpc_loss`, of which this is denominator "all" at hardness 0.
    """
    return region_phpc_loss(
        features,
        labels,
        region_size,
        temperature,
        hardness=0.0,
        local_size=local_size,
        denominator="all",
        background=background,
        ignore_index=ignore_index,
        per_image=per_image,
        normalize=normalize,
        reduction=reduction,
    )
