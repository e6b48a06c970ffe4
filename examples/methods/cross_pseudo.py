"""Two networks that label for each other (CPS: Chen et al., CVPR 2021, arXiv 2106.01226)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher
from examples.networks import build_network, load_body


class CrossPseudo(MeanTeacher):
    """CE + Dice of both networks on labels; on all images each learns the classes that the other one sees.

        L = L_s(f_1) + L_s(f_2) + weight · [ CE(f_1(x), argmax f_2(x)) + CE(f_2(x), argmax f_1(x)) ]

    As in the paper both start from one trained body and from heads of their own: the second one's is random. What is
    measured is the first one's average. Differences: the cross terms are ramped up; unlabelled images come in their
    strong view, which both networks see.
    """

    def __init__(self, *args: Any, weight: float = 1.0):
        super().__init__(*args)
        self.weight = weight
        torch.manual_seed(self.seed + 1_000_003)
        self.second = build_network(self.slices.channels, len(self.slices.classes), self.settings.features)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_step == 0:
            load_body(self.second, self.network.state_dict())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        count, images = len(batch["labels"]), torch.cat([batch["images"], batch["strong"]])
        logits = [network(images) for network in (self.network, self.second)]
        labelled = sum(self.segmentation_loss(own[:count], batch["labels"][:, None]) for own in logits)
        cross = sum(F.cross_entropy(a, b.detach().argmax(1)) for a, b in (logits, logits[::-1]))
        self.log_dict({"method/labelled": labelled, "method/cross": cross})
        return labelled + self.ramp() * self.weight * cross
