"""Whole 3-D volumes, with the interface of slices: training draws patches, evaluation slides a window over each."""

from dataclasses import dataclass

import torch
from monai.transforms import SpatialPad
from torch import Tensor

from examples.data.slices import Slices


@dataclass
class Volumes(Slices):
    """As Slices, but images is a list of [C, X, Y, Z], labels of [X, Y, Z], in their own sizes, none below the patch.

    Every volume is a "plane" of its own: patches of one volume are no negatives of each other.
    """

    patch: tuple[int, int, int] = (48, 48, 48)
    noun = "volumes"

    @property
    def size(self) -> tuple[int, ...]:
        return self.patch

    def take(self, positions: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.images[i] for i in positions], [self.labels[i] for i in positions]

    def has_foreground(self) -> Tensor:
        return torch.tensor([bool((label > 0).any()) for label in self.labels])


def pad(volume: Tensor, patch: tuple[int, ...], value: float) -> Tensor:
    """[C, X, Y, Z], none of its sides below the patch's."""
    return torch.as_tensor(SpatialPad(patch, constant_values=value)(volume)).contiguous()
