"""Regions of a feature map: the cells of a grid."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def region_shape(
    size: int | Sequence[int] | None, spatial: Sequence[int], name: str = "region_size"
) -> tuple[int, ...]:
    """One cell size per spatial axis.

    Args:
        size: One number, or one per axis. None: the whole map.
        spatial: Extents of the map.
        name: Name of the argument for the error.

    Raises:
        ValueError: The number of axes differs.
    """
    if size is None:
        return tuple(max(1, extent) for extent in spatial)
    if isinstance(size, int):
        sizes = (size,) * len(spatial)
    elif hasattr(size, "__index__") and not getattr(size, "ndim", 0):  # arrays have __index__ too
        sizes = (operator.index(size),) * len(spatial)
    else:
        sizes = tuple([one if isinstance(one, int) else operator.index(one) for one in size])
    if len(sizes) != len(spatial):
        raise ValueError(f"{name} must have one value per spatial axis ({len(spatial)}), got {size!r}")
    return sizes


def grid_shape(spatial: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Number of cells on each axis. Cells at the border may be smaller. An empty map has one cell without pixels.

    Args:
        spatial: Extents of the map.
        size: Cell size on each axis.
    """
    return tuple(max(1, math.ceil(extent / cell)) for extent, cell in zip(spatial, size))


class Grid(NamedTuple):
    """A regular grid over a map `[batch, *spatial]`. Each cell is a region.

    Cells are numbered in row-major order.

    Attributes:
        batch: Number of images.
        spatial: Extents of the map.
        size: Cell size on each axis, in pixels.
        per_image: Each image has its own regions. False: a region is the same cell of all images.
    """

    batch: int
    spatial: tuple[int, ...]
    size: tuple[int, ...]
    per_image: bool = False

    def num_regions(self) -> int:
        """Number of regions."""
        return math.prod(grid_shape(self.spatial, self.size)) * (max(self.batch, 1) if self.per_image else 1)

    def ids(self, device: torch.device) -> Tensor:
        """Region of each pixel [batch * prod(spatial)].

        Args:
            device: Device of the result.
        """
        return grid_regions(self.batch, self.spatial, self.size, per_image=self.per_image, device=device)[0]


def grid_regions(
    batch: int,
    spatial: Sequence[int],
    size: Sequence[int],
    *,
    per_image: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, int]:
    """Region of each pixel of a map `[B, *S]`.

    Args:
        batch: Number of images.
        spatial: Extents of the map.
        size: Cell size on each axis.
        per_image: Each image has its own regions. False: a region is the same cell of all images (Hu et al. 2021).
        device: Device of the result.

    Returns:
        Region of each pixel [B * prod(S)], and the number of regions. Cells are numbered in row-major order.
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
