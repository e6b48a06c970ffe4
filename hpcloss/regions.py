"""Grid regions of a feature map, and the random choice of a few of them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def region_shape(
    size: int | Sequence[int] | None, spatial: Sequence[int], name: str = "region_size"
) -> tuple[int, ...]:
    """One cell size per spatial axis; None is the whole map. ValueError for a wrong number of axes."""
    if size is None:
        return tuple(max(1, extent) for extent in spatial)
    if isinstance(size, Sequence):
        sizes = tuple(size)
    elif isinstance(size, int) or not getattr(size, "ndim", 0):
        sizes = (size,) * len(spatial)
    else:
        sizes = tuple([operator.index(one) for one in size])  # an array
    if len(sizes) != len(spatial):
        raise ValueError(f"{name} must have one value per spatial axis ({len(spatial)}), got {size!r}")
    return sizes


def grid_shape(spatial: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Number of cells on each axis; remainder pixels form smaller cells, an empty map has one cell without pixels."""
    return tuple(max(1, math.ceil(extent / cell)) for extent, cell in zip(spatial, size))


class Grid(NamedTuple):
    """The regions of a [batch, *spatial] map that are the cells of a grid: `grid_regions` of these arguments."""

    batch: int
    spatial: tuple[int, ...]
    size: tuple[int, ...]
    per_image: bool = False

    def num_regions(self) -> int:
        """Number of regions."""
        return math.prod(grid_shape(self.spatial, self.size)) * (max(self.batch, 1) if self.per_image else 1)

    def ids(self, device: torch.device) -> Tensor:
        """Region of each pixel [batch * prod(spatial)]."""
        return grid_regions(self.batch, self.spatial, self.size, per_image=self.per_image, device=device)[0]


def grid_regions(
    batch: int,
    spatial: Sequence[int],
    size: Sequence[int],
    *,
    per_image: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, int]:
    """Region of each pixel of a [B, *S] map as ids [B * prod(S)] and the number of regions.

    Cells are numbered in row-major order; the same cell of every image of the batch is one region (as in Hu et al.
    2021), or one region per image with `per_image`.
    """
    cells = grid_shape(spatial, size)
    ids = torch.zeros((1,) * len(cells), dtype=torch.int64, device=device)
    for axis, (extent, cell, count) in enumerate(zip(spatial, size, cells)):
        along = torch.arange(extent, device=device) // cell
        ids = ids * count + along.view(-1, *(1,) * (len(cells) - 1 - axis))
    number = math.prod(cells)
    ids = ids.reshape(1, -1)
    if per_image:
        ids = ids + number * torch.arange(batch, device=device)[:, None]
        return ids.reshape(-1), number * max(batch, 1)
    return ids.expand(batch, -1).reshape(-1), number


def cells_of_regions(
    region_ids: Tensor,
    batch: int,
    spatial: Sequence[int],
    size: Sequence[int],
    local: Sequence[int],
    *,
    per_image: bool,
) -> list[Tensor]:
    """For each small cell of a region, in row-major order: its number in the grid of small cells, for each region [R].

    `local` divides `size`. A region at the far edge has fewer cells; the missing ones get the number of small cells.
    """
    regions, cells = grid_shape(spatial, size), grid_shape(spatial, local)
    num_cells = math.prod(cells) * (batch if per_image else 1)
    image = region_ids // math.prod(regions)
    corner = [region_ids // math.prod(regions[axis + 1 :]) % regions[axis] for axis in range(len(regions))]
    ratios = [large // small for large, small in zip(size, local)]
    numbers = []
    for offset in itertools.product(*(range(ratio) for ratio in ratios)):
        number, exists = image, torch.ones_like(image, dtype=torch.bool)
        for axis, count in enumerate(cells):
            along = corner[axis] * ratios[axis] + offset[axis]
            exists = exists & (along < count)
            number = number * count + along
        numbers.append(torch.where(exists, number, num_cells))
    return numbers


def choose_regions(
    regions: Tensor,
    num_regions: int,
    labels: Tensor,
    alive: Tensor,
    anchor: Tensor,
    keep: int,
    agree: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep at most `keep` regions, drawn uniformly among those that can be contrasted, and renumber them 0 .. keep - 1.

    A region can be contrasted if it holds an anchor and two labels. regions [N] ids, labels [N], alive [N] whether the
    pixel takes part, anchor [N] whether it is an anchor. Returns the new ids [N], `keep` for the pixels of
    regions left out (which removes them), and the old number of each kept region [keep].
    Draws from torch's generator of the device, so `torch.manual_seed` fixes the choice. agree: makes several ranks draw
    the same, from the largest of what each has seen in a region and the tickets of one of them.
    """
    anchors = torch.zeros(num_regions, dtype=torch.int64, device=regions.device).scatter_add_(0, regions, anchor.long())
    bounds = torch.iinfo(torch.int64)
    lowest, highest = (
        torch.full((num_regions,), start, dtype=torch.int64, device=regions.device).scatter_reduce_(
            0, regions, torch.where(alive, labels, start), how
        )
        for start, how in ((bounds.max, "amin"), (bounds.min, "amax"))
    )
    seen, ticket = torch.stack([anchors, ~lowest, highest]), torch.rand(num_regions, device=regions.device)
    if agree is not None:
        seen, ticket = agree(seen, ticket)
    possible = (seen[0] > 0) & (~seen[1] < seen[2])
    ticket = torch.where(possible, ticket, -1.0)
    chosen = torch.topk(ticket, keep)
    renumbered = torch.where(chosen.values >= 0, torch.arange(keep, device=regions.device), keep)
    number = torch.full((num_regions,), keep, dtype=torch.int64, device=regions.device)
    return number.scatter_(0, chosen.indices, renumbered)[regions], chosen.indices
