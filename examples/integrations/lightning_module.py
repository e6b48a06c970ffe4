"""Region contrast in a LightningModule: automatic optimisation, any number of devices, logged values.

    python -m examples.integrations.lightning_module builtin --steps 500
    python -m examples.integrations.lightning_module Task04_Hippocampus --steps 2000 --devices 2

trains a 2-D U-Net on the slices of a folder (any layout of `examples/README.md`) or on the built-in MRI. On more than
one device the loss contrasts the pixels of all of them: `gather=True` makes it the loss of the whole batch.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.data.folders import read_folder
from examples.data.virtual_subjects import virtual_subjects
from hpcloss import FeatureTap, ProjectionHead, RegionPHPCLoss


class ContrastiveSegmentation(L.LightningModule):
    """Cross-entropy + weight · RegionPHPC of what one layer of the network computes.

    Args:
        network: any segmentation network, [B, C, *S] to logits [B, classes, *S].
        layer, channels: the tapped layer's name and the number of its channels.
        ramp_steps: optimiser steps over which the term's weight rises; a fifth of the training is a good number.
        weight: of the contrastive term after them.
    """

    def __init__(
        self, network: nn.Module, layer: str, channels: int, ramp_steps: int, weight: float = 0.1, lr: float = 2e-3
    ):
        super().__init__()
        self.tapped = FeatureTap(network, layer)
        self.head = ProjectionHead(channels, dim=64)
        self.ramp_steps, self.weight, self.lr = ramp_steps, weight, lr

    def setup(self, stage: str) -> None:
        self.contrast = RegionPHPCLoss(region_size=16, gather=self.trainer.world_size > 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.tapped.model(images)  # the network itself: no head, no features

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        logits, features = self.tapped(images)
        supervised = F.cross_entropy(logits, labels)
        contrastive, stats = self.contrast(self.head(features), labels, return_stats=True)
        ramp = min(1.0, self.global_step / max(1, self.ramp_steps))
        self.log_dict({"train/cross_entropy": supervised, "train/contrast": contrastive})
        self.log_dict({f"contrast/{name}": value for name, value in stats.items()})
        return supervised + self.weight * ramp * contrastive

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("val/cross_entropy", F.cross_entropy(self(images), labels), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(arguments: list[str] | None = None) -> L.Trainer:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="a folder, or builtin")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    slices = virtual_subjects() if options.data == "builtin" else read_folder(Path(options.data))
    padding = torch.ones_like(slices.labels, dtype=torch.bool)
    for inside in slices.unpadded(padding, list(range(len(slices)))):
        inside[...] = False
    labels = slices.labels.long().masked_fill(padding, -100)  # counts in neither loss
    train, val = (
        TensorDataset(slices.images[rows].as_subclass(Tensor), labels[rows].as_subclass(Tensor))
        for rows in (slices.of_part("train"), slices.of_part("val"))
    )
    features = (16, 16, 32, 64, 128, 16)
    network = BasicUNet(
        spatial_dims=2, in_channels=slices.channels, out_channels=len(slices.classes), features=features
    )
    trainer = L.Trainer(devices=options.devices, max_steps=options.steps, default_root_dir=options.out)
    trainer.fit(
        ContrastiveSegmentation(network, "upcat_1", channels=features[-1], ramp_steps=options.steps // 5),
        DataLoader(train, batch_size=8, shuffle=True, drop_last=True),
        DataLoader(val, batch_size=8),
    )
    return trainer


if __name__ == "__main__":
    main()
