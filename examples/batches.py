"""Batches drawn with MONAI's transforms. Batch number i is a function of (seed, stage, rank, i) alone, so a resumed run
sees the batches that an uninterrupted one would have seen, and every arm of a seed starts from the same draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandAffined,
    RandBiasField,
    RandFlipd,
    RandGaussianNoise,
    RandScaleIntensity,
)
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.slices import Slices

Batch = dict[str, Tensor]


class Crops:
    """Random crops of slices or volumes: one geometry each, then any number of views that differ in intensity only."""

    def __init__(self, slices: Slices, crop: tuple[int, ...]):
        self.images, self.labels = slices.images, slices.labels
        self.geometry = {size: geometry(size, crop) for size in {tuple(image.shape[1:]) for image in slices.images}}
        self.intensity = Compose(
            [
                RandAdjustContrast(prob=0.8, gamma=(0.5, 2.0)),
                RandBiasField(prob=0.5, degree=2, coeff_range=(0.0, 0.3)),
                RandScaleIntensity(prob=0.8, factors=0.3),
                RandGaussianNoise(prob=0.8, std=0.2),
            ]
        )

    def draw(
        self, rng: np.random.RandomState, positions: np.ndarray, views: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Crops [n, C, h, w] with unchanged intensities, labels [n, h, w], and `views` intensity versions of them."""
        warps = [self.geometry[tuple(self.images[i].shape[1:])] for i in positions]
        with plain_tensors():
            for transform in (*dict.fromkeys(warps), self.intensity):
                transform.set_random_state(state=rng)
            pairs = [
                warp({"image": self.images[i], "label": self.labels[i][None].float()})
                for warp, i in zip(warps, positions, strict=True)
            ]
            plain = torch.stack([pair["image"] for pair in pairs])
            labels = torch.stack([pair["label"][0] for pair in pairs]).long()
            changed = [torch.stack([self.intensity(image) for image in plain]) for _ in range(views)]
        return plain, labels, changed


def geometry(size: tuple[int, ...], crop: tuple[int, ...]) -> Compose:
    """Flip to the other side, then a random affine crop of images of this size, at most as large as they are."""
    crop = tuple(map(min, crop, size))
    return Compose(
        [
            RandFlipd(("image", "label"), prob=0.5, spatial_axis=0),
            RandAffined(
                ("image", "label"),
                spatial_size=crop,
                prob=1.0,
                rotate_range=(0.2,) * (1 if len(size) == 2 else 3),
                shear_range=0.1,
                scale_range=0.15,
                translate_range=tuple((side - length) // 2 for side, length in zip(size, crop, strict=True)),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
        ]
    )


@contextmanager
def plain_tensors() -> Iterator[None]:
    """MONAI's transforms without their meta data, which these crops do not need and which costs half the time."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


class Steps(Dataset):
    """Batches number first ... first + count - 1 of a stage."""

    def __init__(self, draw: Callable[[np.random.RandomState], Batch], key: tuple[int, ...], first: int, count: int):
        self.draw, self.key, self.first, self.count = draw, key, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.count:
            raise IndexError(index)
        seed = np.random.SeedSequence([*self.key, self.first + index]).generate_state(4)
        return self.draw(np.random.RandomState(seed))
