"""Bidirectional copy-paste between labelled and unlabelled images (BCP: Bai et al., CVPR 2023, arXiv 2305.00673)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import MaskedDiceLoss
from torch import Tensor

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher

SIDE = 2 / 3  # of the rectangle, in sides of the image


class CopyPaste(MeanTeacher):
    """A rectangle of an unlabelled image in a labelled one, and the reverse; pixels keep their labels.

        x_in  = x_a in the rectangle, u_a around it,    x_out = u_b in the rectangle, x_b around it
        L = L_s where labels are + weight · L_s where the averaged network's classes are

    with L_s the mean of CE and Dice over the pixels of both together. Differences: pseudo-labels are not cut to their
    largest component; the network starts from the comparison's supervised weights, not from ones of copy-paste among
    labelled images.
    """

    def __init__(self, *args: Any, weight: float = 0.5):
        super().__init__(*args)
        self.weight = weight
        self.dice = MaskedDiceLoss(batch=True)

    def draw(self, rng: np.random.RandomState) -> Batch:
        batch = super().draw(rng)
        count, *_, height, width = batch["images"].shape
        inside = torch.stack([rectangle(rng, (height, width)) for _ in range(count)])
        inside[count // 2 :] = ~inside[count // 2 :]  # there the labelled image is around the rectangle
        return batch | {"of_labels": inside}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        of_labels = batch["of_labels"]
        with torch.no_grad():
            pseudo = self.teacher(batch["weak"]).argmax(1)
        logits = self.network(torch.where(of_labels[:, None], batch["images"], batch["strong"]))
        labels = torch.where(of_labels, batch["labels"], pseudo)
        labelled, unlabelled = (self.masked_loss(logits, labels, mask) for mask in (of_labels, ~of_labels))
        self.log_dict({"method/labelled": labelled, "method/unlabelled": unlabelled})
        return labelled + self.weight * unlabelled

    def masked_loss(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The mean of CE and Dice over the pixels of the mask [n, H, W]."""
        entropy = F.cross_entropy(logits, labels, reduction="none")
        # Probabilities, not logits: MONAI multiplies what it is given by the mask.
        classes = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)
        dice = self.dice(logits.softmax(1), classes, mask[:, None].to(logits.dtype))
        return ((entropy * mask).sum() / mask.sum() + dice) / 2


def rectangle(rng: np.random.RandomState, size: tuple[int, int]) -> Tensor:
    """[H, W] bool: a rectangle of two thirds of the sides, anywhere."""
    inside = torch.zeros(size, dtype=torch.bool)
    sides = [round(SIDE * n) for n in size]
    first = [rng.randint(n - side + 1) for n, side in zip(size, sides, strict=True)]
    inside[tuple(slice(a, a + side) for a, side in zip(first, sides, strict=True))] = True
    return inside
