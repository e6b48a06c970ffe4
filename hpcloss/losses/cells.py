"""Contrast at two sizes: with the pixels of a region, and with one small cell of it at a time.

Tang et al. ("Hard positives oriented contrastive learning", ISBI 2023) contrast large regions and small ones. Here each
anchor of a region also meets every small cell of its region, one at a time. Each key of a cell counts as often as the
region has cells. The mean over the cells in which the anchor counts is added to its loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpcloss.distributed import gather_labels
from hpcloss.plan.partition import Pairs, partition
from hpcloss.plan.regions import Grid, grid_shape
from hpcloss.plan.sorting import changes
from hpcloss.primitives.rows import Rows, pack


def contrast_with_cells(
    recipe: Callable[..., tuple[Tensor, Tensor]],
    rows: Rows,
    pairs: Pairs,
    features: Tensor,
    labels: Tensor,
    regions: Grid,
    cells: Grid,
    region_ids: Tensor | None,
    background: int | None,
    normalize: bool,
    pooled: bool,
) -> Tensor:
    """Mean over the small cells of its region of each anchor's contrast with that cell `[N]`.

    Args:
        recipe: `contrast` of these rows, a function of pairs, keys and multiplicity.
        rows: Packed anchors `[N, D]`.
        pairs: The pairs of the regions.
        features: The feature map.
        labels: Label of each pixel, flat.
        regions: The grid of regions.
        cells: The grid of small cells.
        region_ids: Number in the grid of each region of `pairs` `[R]`. None: the regions are those of the grid.
        background: As in the loss.
        normalize: As in the loss.
        pooled: Cells reach across ranks, as regions do.
    """
    cell_of_pixel, num_cells = cells.ids(features.device), cells.num_regions()
    alive = torch.arange(pairs.order.numel(), device=features.device) < pairs.live()
    if pooled:
        everyone = gather_labels(labels[pairs.order], torch.where(alive, cell_of_pixel[pairs.order], -1), num_cells)
        keys = partition(everyone.labels, everyone.regions, num_cells, background=background)
        key_rows = everyone.keys(rows, keys.order)
        pairs, labels = pairs.replace(order=everyone.own), everyone.labels
    else:
        # Only packed pixels take part. Others (ignored, not sampled, region not chosen) get no cell.
        pixels = torch.where(alive, pairs.order.long(), labels.numel())
        taken = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=features.device).scatter_(0, pixels, True)[:-1]
        keys = partition(labels, torch.where(taken, cell_of_pixel, num_cells), num_cells, background=background)
        key_rows = pack(features, keys.order, keys.live(), normalize=normalize, backend=rows.backend)
    multiplicity = math.prod([large // small for large, small in zip(regions.size, cells.size)])
    total = torch.zeros_like(rows.companion[:, 0])
    cells_met = torch.zeros_like(total)
    if region_ids is None:
        region_ids = torch.arange(pairs.intervals.key_end.numel(), device=features.device)
    for cell_of_region in cells_of_regions(region_ids, regions, cells):
        cell_pairs = against_cells(pairs, keys, cell_of_region, labels, background)
        loss, counted = recipe(cell_pairs, keys=key_rows, multiplicity=multiplicity)
        total, cells_met = total + loss, cells_met + counted
    return total / cells_met.clamp(min=1)


def cells_of_regions(region_ids: Tensor, regions: Grid, cells: Grid) -> list[Tensor]:
    """The small cells of each region: their numbers in the grid of small cells, one tensor `[R]` per cell.

    Both grids are of one map, and the cells' size divides the regions'. Cells are in row-major order. A region at the
    border has fewer cells: a missing cell gets the number of small cells.

    Args:
        region_ids: Numbers in the grid of regions `[R]`.
        regions: The grid of regions.
        cells: The grid of small cells.
    """
    large, small = grid_shape(regions.spatial, regions.size), grid_shape(cells.spatial, cells.size)
    num_cells = math.prod(small) * (cells.batch if cells.per_image else 1)
    image = region_ids // math.prod(large)
    corner = [region_ids // math.prod(large[axis + 1 :]) % large[axis] for axis in range(len(large))]
    ratios = [whole // part for whole, part in zip(regions.size, cells.size)]
    numbers = []
    for offset in itertools.product(*(range(ratio) for ratio in ratios)):
        number, exists = image, torch.ones_like(image, dtype=torch.bool)
        for axis, count in enumerate(small):
            along = corner[axis] * ratios[axis] + offset[axis]
            exists = exists & (along < count)
            number = number * count + along
        numbers.append(torch.where(exists, number, num_cells))
    return numbers


def against_cells(pairs: Pairs, cells: Pairs, cell_of_region: Tensor, labels: Tensor, background: int | None) -> Pairs:
    """The anchors of `pairs` against one small cell of each region. Keys have the order of `cells`.

    Args:
        pairs: The partition of the pixels by region.
        cells: The partition of the same pixels by small cell.
        cell_of_region: The cell of the anchors of each region `[R]`. The number of cells: none.
        labels: Label of each pixel.
        background: As in the loss.
    """
    dtype, device = pairs.order.dtype, pairs.order.device
    labels = labels.reshape(-1).long()
    at = cells.intervals
    num_pixels, num_cells = labels.numel(), at.key_end.numel()
    # Classes by dense rank, background first, so that (cell, class) is one number in the order of the cells' rows.
    by_label = torch.sort(labels, stable=True).indices
    if background is not None:
        by_label = by_label[torch.sort((labels != background)[by_label], stable=True).indices]
    dense = torch.empty_like(by_label).scatter_(0, by_label, torch.cumsum(changes(labels[by_label]), 0))

    rows = torch.arange(cells.order.numel(), device=device)
    cell = torch.searchsorted(at.key_end, rows.to(dtype), right=True)
    alive = cell < num_cells
    segment = torch.where(alive, cell * (num_pixels + 1) + dense[cells.order], torch.iinfo(torch.int64).max)
    target = cell_of_region[pairs.intervals.region()] * (num_pixels + 1) + dense[pairs.order]
    pos_start = torch.searchsorted(segment, target)
    pos_end = torch.searchsorted(segment, target, right=True)

    row_of_pixel = torch.full((num_pixels + 1,), -1, dtype=torch.int64, device=device)
    row_of_pixel = row_of_pixel.scatter_(0, torch.where(alive, cells.order.long(), num_pixels), rows)
    key_start = torch.nn.functional.pad(at.key_start, (0, 1))[cell_of_region]
    key_end = torch.nn.functional.pad(at.key_end, (0, 1))[cell_of_region]
    return pairs.replace(
        pos_start=pos_start.to(dtype),
        pos_end=pos_end.to(dtype),
        self_pos=row_of_pixel[pairs.order].to(dtype),
        key_start=key_start,
        key_end=key_end,
    )
