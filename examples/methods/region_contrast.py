"""Region contrast as a further term of the mean teacher: on labels, and on the teacher's confident classes."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher, Outputs
from hpcloss import ProjectionHead, RegionPHPCLoss


class RegionContrast(MeanTeacher):
    """The mean teacher with `RegionPHPCLoss` beside its consistency, on every image of the step.

    Stage 2 of Tang et al. (ISBI 2023) sees labelled slices alone, all from one scanner in the built-in comparison; this
    is the same contrast where the other scanners are: unlabelled pixels take part where the teacher is sure.
    """

    def __init__(self, *args: Any, weight: float = 0.1, loss: nn.Module | None = None):
        super().__init__(*args)
        self.weight, settings = weight, self.settings
        self.projector = ProjectionHead(settings.features[-1], settings.embedding_dim)
        self.contrast = loss or RegionPHPCLoss(
            settings.region_size,
            num_classes=len(self.slices.classes),
            samples_per_class=settings.samples_per_class,
            background=None,
            reduction="class",
        )

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        pseudo = self.pseudo_labels(outputs.teacher_logits)
        contrast = self.contrast(self.projector(outputs.features), torch.cat([batch["labels"], pseudo]))
        self.log("method/contrast", contrast)
        return super().unlabelled_loss(batch, outputs) + self.weight * contrast
