"""Two granularities: the pixels of a region against one small cell of it at a time.

Tang et al. ("Hard positives oriented contrastive learning", ISBI 2023) contrast large regions and, beside them, small
ones. Here each anchor of a region meets every small cell of its region alone, with each key counted as often as the
region has cells, and the mean over the cells that hold a pair for it is added to its loss.
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
    """Mean over the small cells of its region of each anchor's contrast against that cell alone [N].

    recipe: `contrast` of these rows, to be called with pairs, keys and their multiplicity. labels [pixels]. region_ids
    [R]: the number in the grid of each region of `pairs`; None: regions are the grid's. pooled: cells reach across
    ranks, as regions do.
    """
    cell_of_pixel, num_cells = cells.ids(features.device), cells.num_regions()
    alive = torch.arange(pairs.order.numel(), device=features.device) < pairs.live()
    if pooled:
        everyone = gather_labels(labels[pairs.order], torch.where(alive, cell_of_pixel[pairs.order], -1), num_cells)
        keys = partition(everyone.labels, everyone.regions, num_cells, background=background)
        key_rows = everyone.keys(rows, keys.order)
        pairs, labels = pairs.replace(order=everyone.own), everyone.labels
    else:
        # Only pixels that are rows take part: the others (ignored, not sampled, region not chosen) get no cell.
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
    """For each small cell of a region, in row-major order: its number in the grid of small cells, for each region [R].

    Both grids are of one map, and the cells' size divides the regions'. region_ids [R]: numbers in the grid of regions.
    A region at the far edge has fewer cells; the missing ones get the number of small cells.
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
    """The anchors of `pairs` against one small cell of each region: keys in the order of `cells`.

    pairs, cells: partitions of the same pixels, by region and by small cell. cell_of_region [R]: the cell that the
    anchors of each region meet; the number of cells stands for "none". labels [pixels].
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
