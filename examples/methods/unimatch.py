"""Two strong views and perturbed features (UniMatch: Yang et al., CVPR 2023, arXiv 2208.09910)."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.batches import Batch
from examples.methods.fixmatch import FixMatch, confident_cross_entropy
from examples.networks import DECODER
from examples.warps import weak_view

DROPPED = 0.5  # of the channels
SHARE = (0.02, 0.4)  # of the area of a view that comes from another image
MIXED = 0.5  # of the images


class UniMatch(FixMatch):
    """CE + Dice on labels; a weak view's confident classes label two strong views and perturbed features.

        L_u = 1/2 CE(decoder(dropout(encoder(weak))), y) + 1/4 [ CE(f(strong_1), y_1) + CE(f(strong_2), y_2) ]

    A rectangle of half of the strong views comes from another image, with its pseudo-labels y (CutMix). Half of the
    channels of each level of the encoder are dropped. Differences: pseudo-labels are the averaged network's; the other
    image is of the same batch.
    """

    def draw(self, rng: np.random.RandomState) -> Batch:
        count = self.settings.labelled_batch
        _, labels, (images,) = self.crops.draw(rng, self.pick(rng, self.split.labelled, count), views=1)
        plain, _, strong = self.crops.draw(rng, self.pick(rng, self.split.train, count), views=2)
        weak = weak_view(plain, torch.Generator().manual_seed(int(rng.randint(2**31))))
        boxes = torch.stack([random_boxes(rng, count, plain.shape[2:]) for _ in strong])
        return {"images": images, "labels": labels, "weak": weak, "strong": torch.stack(strong), "boxes": boxes}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        count = len(batch["labels"])
        with torch.no_grad():
            labels = self.pseudo_labels(self.teacher(batch["weak"]))
        mixed = [mix(view, inside) for view, inside in zip(batch["strong"], batch["boxes"], strict=True)]
        logits = self.network(torch.cat([batch["images"], *mixed]))
        with channel_dropout(self.network):
            perturbed = self.network(batch["weak"])
        labelled = self.segmentation_loss(logits[:count], batch["labels"][:, None])
        views = [
            confident_cross_entropy(own, mix(labels, inside))
            for own, inside in zip(logits[count:].chunk(2), batch["boxes"], strict=True)
        ]
        unlabelled = confident_cross_entropy(perturbed, labels) / 2 + sum(views) / 4
        self.log_dict({"method/labelled": labelled, "method/unlabelled": unlabelled})
        return labelled + self.ramp() * unlabelled


def random_boxes(rng: np.random.RandomState, count: int, size: tuple[int, ...]) -> Tensor:
    """[n, H, W] bool: in every other image on average a rectangle of 2 to 40 % of the area, in the others nothing."""
    boxes = torch.zeros(count, *size, dtype=torch.bool)
    for box in boxes:
        if rng.rand() < MIXED:
            area, ratio = rng.uniform(*SHARE), np.exp(rng.uniform(-1, 1))
            sides = [
                max(1, min(n, round(n * np.sqrt(area * r)))) for n, r in zip(size, (ratio, 1 / ratio), strict=True)
            ]
            first = [rng.randint(n - side + 1) for n, side in zip(size, sides, strict=True)]
            box[tuple(slice(a, a + side) for a, side in zip(first, sides, strict=True))] = True
    return boxes


def mix(maps: Tensor, inside: Tensor) -> Tensor:
    """Maps [n, ..., H, W], inside the boxes [n, H, W] those of the image before."""
    return torch.where(inside if maps.ndim == inside.ndim else inside[:, None], maps.roll(1, 0), maps)


@contextmanager
def channel_dropout(network: nn.Module) -> Iterator[None]:
    """Inside it the decoder gets half of the channels of each level of the encoder, twice as large.

    The encoder itself runs undisturbed: its levels see each other whole.
    """

    def drop(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        below, skipped = inputs
        below = F.dropout2d(below, DROPPED) if module is deepest else below
        return below, F.dropout2d(skipped, DROPPED)

    deepest = network.get_submodule(DECODER[0])
    hooks = [network.get_submodule(name).register_forward_pre_hook(drop) for name in DECODER]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
