"""Local contrast with rounds of pseudo-labels (Chaitanya et al., MedIA 2023, arXiv 2112.09645)."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher, Outputs
from examples.networks import LAST
from hpcloss import FeatureTap, LocalContrastLoss, ProjectionHead

IGNORED = 255


class LocalContrast(MeanTeacher):
    """CE + Dice on labels, and pixels against the class means of pairs of images, labelled and pseudo-labelled.

    Pseudo-labels come from the averaged network as it was when the round began, where it is sure; rounds divide the
    stage evenly. As in the paper unlabelled images enter through the contrast alone, there is no consistency term.
    Differences: the authors post-process pseudo-labels with a dense CRF, and both images of a pair with itself get an
    intensity view of their own.
    """

    def __init__(self, *args: Any, weight: float = 0.1, rounds: int = 3, dim: int = 16):
        super().__init__(*args)
        self.weight, self.rounds = weight, rounds
        self.projector = ProjectionHead(self.settings.features[-1], dim, hidden=dim)
        self.contrast = LocalContrastLoss(num_classes=len(self.slices.classes))
        self.labeller = copy.deepcopy(self.teacher.module)
        object.__setattr__(self, "teacher_tap", FeatureTap(self.labeller, LAST))

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_step == 0:
            self.begin_round()

    def after_step(self) -> None:
        if self.global_step % math.ceil(self.iterations / self.rounds) == 0:
            self.begin_round()

    def begin_round(self) -> None:
        """From now on pseudo-labels are those of the averaged network as it is."""
        self.labeller.load_state_dict(self.teacher.module.state_dict())

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        sureness, classes = outputs.teacher_logits.softmax(1).max(1)
        sure = sureness > self.settings.confidence
        labels = torch.cat([batch["labels"], torch.where(sure, classes, IGNORED)])
        first, second = pairs(len(batch["labels"])).to(labels.device).unbind(1)
        images = torch.cat([first, second])
        partner = torch.arange(len(images), device=images.device).roll(len(first))
        partner = torch.where(images == images[partner], -1, partner)  # with itself: its own means, once
        contrast = self.contrast(self.projector(outputs.features)[images], labels[images], partner)
        self.log_dict({"method/contrast": contrast, "method/sure": sure.float().mean()})
        return self.weight * contrast


def pairs(count: int) -> Tensor:
    """The paper's pairs of images for `count` labelled images, number 0 ..., and as many unlabelled ones after them.

    By turns (L0, L0), (L1, U1), ...; (U0, U0), (U0, U1), (U2, U2), (U2, U3), ...: [P, 2].
    """
    labelled = [(k, k if k % 2 == 0 else count + k) for k in range(count)]
    unlabelled = [(count + k, count + other) for k in range(0, count, 2) for other in (k, k + 1) if other < count]
    return torch.tensor(labelled + unlabelled)
