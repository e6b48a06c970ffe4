"""Entropy-guided contrast (EGCL-Net: Xie, Wu & Zhu, IET Image Processing 2024), reconstructed from its abstract."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher, Outputs
from hpcloss import EntropyGuidedContrastLoss, ProjectionHead


class EntropyGuided(MeanTeacher):
    """The mean teacher, and pixels that two branches together are unsure of pulled to sure ones of their class.

    The branches are the network's own linear head and a second head of two layers on its last features; both are
    trained on labels. The mean of their predictions says how sure they are, and of which class unlabelled pixels are.
    """

    def __init__(self, *args: Any, weight: float = 0.1, stride: int = 2, loss: nn.Module | None = None):
        super().__init__(*args)
        width, classes = self.settings.features[-1], len(self.slices.classes)
        self.weight, self.stride = weight, stride
        self.second_head = nn.Sequential(
            nn.Dropout2d(0.25),
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, classes, 1),
        )
        self.projector = ProjectionHead(width, self.settings.embedding_dim)
        self.contrast = loss or EntropyGuidedContrastLoss(samples_per_class=128)

    def labelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        labels = batch["labels"]
        second = self.segmentation_loss(self.second_head(outputs.features[: len(labels)]), labels[:, None])
        return super().labelled_loss(batch, outputs) + second

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        with torch.no_grad():
            probs = (outputs.logits.softmax(1) + self.second_head(outputs.features).softmax(1)) / 2
        labels = torch.cat([batch["labels"], probs[len(batch["labels"]) :].argmax(1)])
        features, probs, labels = (x[..., :: self.stride, :: self.stride] for x in (outputs.features, probs, labels))
        contrast = self.contrast(self.projector(features), probs, labels)
        self.log("method/contrast", contrast)
        return super().unlabelled_loss(batch, outputs) + self.weight * contrast
