"""The mean teacher (Tarvainen & Valpola, NeurIPS 2017): the stage that every other method builds on."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.batches import Batch
from examples.networks import LAST
from examples.stages import Supervised, ramp_up
from examples.warps import weak_view
from hpcloss import FeatureTap

IGNORED = 255  # the label of a pixel that takes no part


class Outputs(NamedTuple):
    """What one step computed: the student on n labelled and u unlabelled images, the teacher on the u (no gradient)."""

    logits: Tensor  # [n + u, C, H, W]
    features: Tensor  # [n + u, D, H, W], the last decoder block's
    teacher_logits: Tensor  # [u, C, H, W]
    teacher_features: Tensor  # [u, D, H, W]


class MeanTeacher(Supervised):
    """Student and averaged teacher: CE + Dice on labelled images, agreement with the teacher on unlabelled ones.

    The teacher sees a weak intensity view, the student a strong one of the same crops. A method overrides

    * `unlabelled_loss(batch, outputs)`: what is ramped up; call `super()` for the consistency term and add to it;
    * `labelled_loss(batch, outputs)`: what counts in full from the first step;
    * `draw(rng)`: further entries of a batch (tensors), a function of `rng` alone;
    * `__init__(*args, **options)`: modules assigned to `self` (heads, losses, banks) are saved and resumed with the
      rest, and their parameters are trained;
    * `after_step()`: what follows the optimiser's step and the teacher's (a memory bank, an EMA head).

    `self.progress` runs from 0 to 1. Sampling inside a loss may use torch's generator, which is seeded by step.
    """

    number = 4

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Not submodules: both networks are registered once, under their own names.
        object.__setattr__(self, "student_tap", FeatureTap(self.network, LAST))
        object.__setattr__(self, "teacher_tap", FeatureTap(self.teacher.module, LAST))

    @property
    def progress(self) -> float:
        """The share of the steps done."""
        return self.global_step / self.iterations

    def ramp(self) -> float:
        """The weight of the unlabelled terms, from 0 to 1."""
        return ramp_up(self.progress / self.settings.ramp)

    def draw(self, rng: np.random.RandomState) -> Batch:
        count = self.settings.labelled_batch
        _, labels, (images,) = self.crops.draw(rng, self.pick(rng, self.split.labelled, count), views=1)
        plain, _, (strong,) = self.crops.draw(rng, self.pick(rng, self.split.train, count), views=1)
        weak = weak_view(plain, torch.Generator().manual_seed(int(rng.randint(2**31))))
        return {"images": images, "labels": labels, "weak": weak, "strong": strong}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        student = self.student_tap(torch.cat([batch["images"], batch["strong"]]))
        with torch.no_grad():
            teacher = self.teacher_tap(batch["weak"])
        outputs = Outputs(*student, *teacher)
        labelled, unlabelled = self.labelled_loss(batch, outputs), self.unlabelled_loss(batch, outputs)
        self.log_dict({"method/labelled": labelled, "method/unlabelled": unlabelled, "method/ramp": self.ramp()})
        return labelled + self.ramp() * unlabelled

    def labelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        """CE + Dice."""
        return self.segmentation_loss(outputs.logits[: len(batch["labels"])], batch["labels"][:, None])

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        """The mean squared difference of the student's and the teacher's probabilities, weighted."""
        probabilities = outputs.logits[len(batch["labels"]) :].softmax(1)
        agreement = F.mse_loss(probabilities, outputs.teacher_logits.softmax(1))
        self.log("method/consistency", agreement)
        return self.settings.consistency_weight * agreement

    def pseudo_labels(self, teacher_logits: Tensor) -> Tensor:
        """The teacher's classes [u, H, W], `IGNORED` where it is not sure."""
        sureness, classes = teacher_logits.softmax(1).max(1)
        sure = sureness > self.settings.confidence
        self.log("method/sure", sure.float().mean())
        return torch.where(sure, classes, IGNORED)

    def after_step(self) -> None:
        """Called after the optimiser's step and the teacher's."""

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        super().on_train_batch_end(outputs, batch, index)
        self.after_step()

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": self.settings.scratch_lr}]
