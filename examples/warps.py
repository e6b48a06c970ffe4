"""Crops drawn for the whole batch at once in PyTorch: the same interface as `Crops`, in a tenth of the time."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.data.slices import Slices


class Warps:
    """Random affine crops of slices: one geometry each, then any number of views that differ in intensity only."""

    def __init__(self, slices: Slices, crop: tuple[int, int]):
        height, width = slices.images.shape[2:]
        self.images, self.labels = (t.as_subclass(Tensor) for t in (slices.images, slices.labels))  # not MONAI's kind
        self.crop = (min(crop[0], height), min(crop[1], width))

    def draw(
        self, rng: np.random.RandomState, positions: np.ndarray, views: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Crops [n, C, h, w] with unchanged intensities, labels [n, h, w], and `views` intensity versions of them."""
        generator = torch.Generator().manual_seed(int(rng.randint(2**31)))
        rows = torch.as_tensor(positions)
        images, labels = self.images[rows], self.labels[rows]
        grid = self.grid(len(rows), images.shape[2:], generator)
        plain = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        moved = F.grid_sample(labels[:, None].float(), grid, "nearest", padding_mode="border", align_corners=False)
        return plain, moved[:, 0].long(), [strong_view(plain, generator) for _ in range(views)]

    def grid(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Sampling positions [n, h, w, 2]: flip along the first axis, rotation, shear, scale and shift."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        angle, shear = uniform(-0.2, 0.2), uniform(-0.1, 0.1)
        scales = [uniform(-0.15, 0.15).exp() for _ in range(2)]
        flip = torch.rand(count, generator=generator).round() * 2 - 1
        cos, sin = angle.cos(), angle.sin()
        # Rows are (width, height) coordinates; lengths in pixels, then each axis divided by its half-length.
        matrix = torch.stack([cos, shear - sin, sin, cos], 1).view(-1, 2, 2)
        matrix = matrix * torch.stack([scales[0], scales[1] * flip], 1)[:, None]
        half = torch.tensor([size[1], size[0]]) / 2
        share = torch.tensor([self.crop[1] / size[1], self.crop[0] / size[0]])
        matrix = matrix * half * share / half[:, None]
        shift = (1 - share) * torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
        return F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), [count, 1, *self.crop], align_corners=False)


def strong_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma, a smooth bias field, gain and noise, other ones for every image."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)

    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    width = (high - low).clamp(min=1e-6)
    changed = ((images - low) / width) ** uniform(-math.log(2), math.log(2)).exp() * width + low
    bias = torch.randn(count, 1, 4, 4, generator=generator)
    changed = changed * (0.2 * F.interpolate(bias, images.shape[2:], mode="bicubic", align_corners=True)).exp()
    return noisy(changed * uniform(0.7, 1.3), uniform(0, 0.2), generator)


def weak_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A little gain and noise."""
    gain = 0.9 + 0.2 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return noisy(images * gain, 0.05, generator)


def noisy(images: Tensor, sd: float | Tensor, generator: torch.Generator) -> Tensor:
    """Images with normal noise added."""
    return images + sd * torch.randn(images.shape, generator=generator)
