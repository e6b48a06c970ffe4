"""Multiscale contrast and cross-supervision (Wu et al., EMBC 2023), reconstructed from its abstract."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher, Outputs
from examples.networks import DECODER, HEAD
from examples.stages import ramp_up
from hpcloss import MultiscaleContrastLoss, ProjectionHead

IGNORED = 255


class Decoder(nn.Module):
    """A second decoder of a network's encoder, a copy of its own to begin with."""

    def __init__(self, network: BasicUNet):
        super().__init__()
        self.blocks = nn.ModuleDict({name: copy.deepcopy(network.get_submodule(name)) for name in (*DECODER, HEAD)})

    def copy_from(self, network: BasicUNet) -> None:
        """Takes over the weights of the network's decoder and linear head."""
        for name, block in self.blocks.items():
            block.load_state_dict(network.get_submodule(name).state_dict())

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and the last block's features, of the encoder's levels from the finest to the coarsest."""
        *skips, x = levels
        for name in DECODER:
            x = self.blocks[name](x, skips.pop())
        return self.blocks[HEAD](x), x


class Multiscale(MeanTeacher):
    """The mean teacher with a second decoder: they teach each other, and are contrasted by patches and by pixels.

    The first branch, the network, sees strong views; the second weak ones, with perturbed features (dropout and noise
    at the bottleneck). Both learn the labels and, ramped up, each other's classes on unlabelled images. The contrast
    pairs equal patches of the branches, and pixels by label or, without one, where the branches agree. The paper has
    no averaged teacher: its consistency stays as the part that all methods of the comparison share.
    """

    def __init__(
        self,
        *args: Any,
        weight: float = 0.1,
        cross_weight: float = 0.1,
        dropout: float = 0.3,
        noise: float = 0.3,
        stride: int = 2,
        loss: nn.Module | None = None,
    ):
        super().__init__(*args)
        self.weight, self.cross_weight, self.stride = weight, cross_weight, stride
        self.dropout, self.noise = dropout, noise
        self.second_decoder = Decoder(self.network)
        self.projector = ProjectionHead(self.settings.features[-1], self.settings.embedding_dim)
        self.contrast = loss or MultiscaleContrastLoss(4, num_classes=len(self.slices.classes))

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.global_step == 0:  # the network may have been loaded after the copy was made
            self.second_decoder.copy_from(self.network)

    def perturbed(self, images: Tensor) -> list[Tensor]:
        """The encoder's levels, the coarsest with channels dropped and multiplied by noise."""
        levels = [self.network.conv_0(images)]
        for block in (self.network.down_1, self.network.down_2, self.network.down_3, self.network.down_4):
            levels.append(block(levels[-1]))
        bottleneck = F.dropout2d(levels[-1], self.dropout)
        levels[-1] = bottleneck * (1 + self.noise * (2 * torch.rand_like(bottleneck) - 1))
        return levels

    def training_step(self, batch: Batch, index: int) -> Tensor:
        labels, count = batch["labels"], len(batch["labels"])
        logits, features = self.student_tap(torch.cat([batch["images"], batch["strong"]]))
        with torch.no_grad():
            outputs = Outputs(logits, features, *self.teacher_tap(batch["weak"]))
        second_logits, second_features = self.second_decoder(
            self.perturbed(torch.cat([batch["images"], batch["weak"]]))
        )
        second = self.segmentation_loss(second_logits[:count], labels[:, None])
        classes, second_classes = logits[count:].argmax(1), second_logits[count:].argmax(1)
        cross = F.cross_entropy(logits[count:], second_classes) + F.cross_entropy(second_logits[count:], classes)
        agreed = torch.where(classes == second_classes, classes, IGNORED)
        contrast = self.contrast(
            *(self.projector(x[..., :: self.stride, :: self.stride]) for x in (features, second_features)),
            torch.cat([labels, agreed])[:, :: self.stride, :: self.stride],
        )
        unlabelled = self.unlabelled_loss(batch, outputs) + self.cross_weight * cross + self.weight * contrast
        ramp = ramp_up(self.progress / self.settings.ramp)
        self.log_dict({"method/cross": cross, "method/contrast": contrast, "method/ramp": ramp})
        return self.labelled_loss(batch, outputs) + second + ramp * unlabelled
