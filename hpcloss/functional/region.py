"""Region-based pixel contrast: hard-positive (PHPC) and supervised (Hu et al.)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    check_label_values,
    check_used,
    checked,
    count,
    integers,
    labels_of_map,
)
from hpcloss.distributed import agree, check_same_regions, distinct, gather_keys, gather_labels, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce, sum_of
from hpcloss.functional.contrast import Contrast
from hpcloss.pack import Rows, pack
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import Pairs, against_cells, class_sort, from_offsets, partition
from hpcloss.regions import Grid, cells_of_regions, region_shape
from hpcloss.sampling import choose_regions, sample
from hpcloss.sorting import is_class, is_ignored


@checked
def region_phpc_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 16,
    temperature: float | Tensor = 0.1,
    hardness: float = 1.0,
    *,
    num_classes: int | None = None,
    samples_per_class: int | None = None,
    max_regions: int | None = None,
    local_size: int | Sequence[int] | None = None,
    denominator: str = "own",
    discount: float = 0.0,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    detach_weights: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_labels: bool = False,
    check_finite: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Region-based hard-positive pixel contrast; equations, arguments and sources in `RegionPHPCLoss`.

    `discount` is the published in-denominator weight exp(-discount s_ij) of a positive in its own denominator.
    """
    labels = labels_of_map(features, labels)
    ignored = integers("ignore_index", ignore_index)
    num_classes = num_classes and count("num_classes", num_classes)
    samples_per_class = samples_per_class and count("samples_per_class", samples_per_class)
    max_regions = max_regions and count("max_regions", max_regions)
    background = None if background is None else integers("background", background)[0]
    if check_labels:
        check_label_values(labels, ignored, num_classes)
    backend, gather = resolve(backend, features), has_peers(gather)
    pooled = gather and not per_image  # regions that reach across ranks
    size = region_shape(region_size, features.shape[2:])
    flat = labels.reshape(-1)
    pairs, region_ids, outside = _plan(
        labels, size, num_classes, samples_per_class, max_regions, background, ignored, per_image, pooled
    )
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), features=features)
    whole = samples_per_class is None and pairs.order.numel() == flat.numel()
    rows = pack(features, pairs.order, pairs.live(), normalize=normalize, permutation=whole, backend=backend)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    recipe, keys = Contrast(rows, denominator, hardness, discount, scale, bound, detach_weights, backend), None
    if pooled:
        pairs, keys = gather_keys(rows, pairs, flat[pairs.order])
    loss, counted = recipe(pairs, keys)
    if local_size is not None:
        local = region_shape(local_size, features.shape[2:], "local_size")
        loss = loss + _local_contrast(
            recipe, pairs, features, flat, region_ids, size, local, per_image, background, normalize, pooled
        )

    regions = None
    if reduction == "region":
        regions = distinct(pairs.region()) if gather and per_image else pairs.region()
    result = reduce(loss, counted, reduction, pairs.order, labels, regions, gather=gather)
    if not return_stats:
        return result
    return result, _stats(recipe, pairs, keys, counted, outside, gather)


@checked
def region_supcon_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 32,
    temperature: float | Tensor = 0.1,
    *,
    num_classes: int | None = None,
    samples_per_class: int | None = None,
    max_regions: int | None = None,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_labels: bool = False,
    check_finite: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Local supervised contrast of Hu et al. 2021; equation and arguments in `RegionSupConLoss`."""
    return region_phpc_loss(
        features, labels, region_size, temperature, 0.0, num_classes=num_classes, samples_per_class=samples_per_class,
        max_regions=max_regions, denominator="all", background=background, ignore_index=ignore_index,
        per_image=per_image, normalize=normalize, reduction=reduction, gather=gather, check_labels=check_labels,
        check_finite=check_finite, return_stats=return_stats, backend=backend,
    )  # fmt: skip


def _plan(
    labels: Tensor,
    size: tuple[int, ...],
    num_classes: int | None,
    samples_per_class: int | None,
    max_regions: int | None,
    background: int | None,
    ignored: tuple[int, ...],
    per_image: bool,
    pooled: bool,
) -> tuple[Pairs, Tensor | None, Tensor | None]:
    """Which pairs of a label map [B, *S] count; the number in the grid of each region [R], None where regions are the
    grid's; and with `num_classes` how many labels are no class and not ignored [].

    pooled: over ranks, which then draw the same regions. Shapes are static: of the regions chosen and the pixels
    sampled only the most there can be is known.
    """
    grid = Grid(labels.shape[0], tuple(labels.shape[1:]), size, per_image)
    flat, num_regions = labels.reshape(-1), grid.num_regions()
    regions: Tensor | Grid = grid
    region_ids = None
    cell = [min(along, extent) for along, extent in zip(size, grid.spatial)]
    region_pixels = math.prod(cell) * (1 if per_image else grid.batch)
    if pooled and max_regions is not None:
        check_same_regions(labels.device, num_regions)  # before the ranks draw some: all of them do or none
    if max_regions is not None and max_regions < num_regions:
        alive = ~is_ignored(flat, ignored, num_classes)
        anchor = alive if background is None else alive & (flat != background)
        regions, region_ids = choose_regions(
            grid.ids(labels.device), num_regions, flat, alive, anchor, max_regions, agree if pooled else None
        )
        num_regions = max_regions
    live = num_regions * region_pixels  # the rows that may not be dead, if there are so many
    if num_classes is None:
        pairs = partition(flat, regions, num_regions, background=background, ignore_index=ignored)
        return pairs.head(live), region_ids, None
    order, offsets, outside = class_sort(
        flat, regions, num_regions, background=background, ignore_index=ignored, num_classes=num_classes
    )
    if samples_per_class is not None and flat.numel():
        most = min(samples_per_class, region_pixels)
        order, offsets = sample(order, offsets, most, num_pixels=flat.numel())
    pairs = from_offsets(order, offsets, num_classes, is_class(background, num_classes))
    return pairs.head(live), region_ids, outside


def _local_contrast(
    recipe: Contrast,
    pairs: Pairs,
    features: Tensor,
    labels: Tensor,
    region_ids: Tensor | None,
    size: tuple[int, ...],
    local: tuple[int, ...],
    per_image: bool,
    background: int | None,
    normalize: bool,
    pooled: bool,
) -> Tensor:
    """Mean over the small cells of its region of each anchor's contrast against that cell alone [N]."""
    batch, spatial = features.shape[0], features.shape[2:]
    grid = Grid(batch, tuple(spatial), local, per_image)
    cells, num_cells = grid.ids(features.device), grid.num_regions()
    alive = torch.arange(pairs.order.numel(), device=features.device) < pairs.live()
    if pooled:
        everyone = gather_labels(labels[pairs.order], torch.where(alive, cells[pairs.order], -1), num_cells)
        keys = partition(everyone.labels, everyone.regions, num_cells, background=background)
        key_rows = everyone.keys(recipe.rows, keys.order)
        pairs, labels = pairs.replace(order=everyone.own), everyone.labels
    else:
        # Only pixels that are rows take part: the others (ignored, not sampled, region not chosen) get no cell.
        pixels = torch.where(alive, pairs.order.long(), labels.numel())
        taken = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=features.device).scatter_(0, pixels, True)[:-1]
        keys = partition(labels, torch.where(taken, cells, num_cells), num_cells, background=background)
        key_rows = pack(features, keys.order, keys.live(), normalize=normalize, backend=recipe.backend)
    multiplicity = math.prod([large // small for large, small in zip(size, local)])
    total = torch.zeros_like(recipe.rows.data[:, 0], dtype=recipe.scale.dtype)
    cells_met = torch.zeros_like(total)
    if region_ids is None:
        region_ids = torch.arange(pairs.key_end.numel(), device=features.device)
    for cell_of_region in cells_of_regions(region_ids, batch, spatial, size, local, per_image=per_image):
        cell_pairs = against_cells(pairs, keys, cell_of_region, labels, background)
        loss, counted = recipe(cell_pairs, key_rows, multiplicity)
        total, cells_met = total + loss, cells_met + counted
    return total / cells_met.clamp(min=1)


def _stats(
    recipe: Contrast, pairs: Pairs, keys: Rows | None, counted: Tensor, outside: Tensor | None, gather: bool
) -> dict[str, Tensor]:
    """What a trainer logs, as 0-dim tensors without gradient; means over the counted anchors, of all ranks with
    `gather`."""
    with torch.no_grad():
        rows, backend = recipe.rows.detach(), recipe.backend
        unit_scale = torch.ones_like(recipe.scale)
        positives, negatives = pairs.counts()
        region = pairs.region()
        whole_region = pairs.replace(pos_start=pairs.key_start[region], pos_end=pairs.key_end[region])
        positive_mean, _ = pair_mean(rows, pairs, "logit", unit_scale, keys=keys, backend=backend)
        others_mean, _ = pair_mean(rows, whole_region, "logit", unit_scale, keys=keys, backend=backend)
        others_sum = others_mean * (positives + negatives)
        negative_mean = (others_sum - positive_mean * positives) / negatives.clamp(min=1)
        effective = torch.ones_like(positive_mean)
        if recipe.hardness:
            # 1 / sum of squared weights, over the number of positives.
            mass, double_mass = (
                pair_lse(rows, pairs, "positives", -factor * recipe.hardness * unit_scale, keys=keys, backend=backend)
                for factor in (1, 2)
            )
            effective = torch.where(counted, torch.exp(2 * mass - double_mass) / positives.clamp(min=1), 0.0)
        number, anchors = sum_of(counted, gather), sum_of(pairs.is_anchor(), gather)
        weight = counted.to(positive_mean.dtype) / number.clamp(min=1)

        def average(values: Tensor) -> Tensor:
            return sum_of(weight * values, gather)

        stats = {} if outside is None else {"labels_outside": sum_of(outside, gather)}
        return {
            **stats,
            "counted_anchors": number.to(weight.dtype) / anchors.clamp(min=1),
            "positives_per_anchor": average(positives),
            "positive_similarity": average(positive_mean),
            "negative_similarity": average(negative_mean),
            "effective_positives": average(effective),
        }
