"""Dice by MONAI, per subject over all of its slices, per class."""

import math

import torch
from monai.metrics import compute_dice
from torch import Tensor, nn

from examples.data.slices import Slices


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Class ids [N, H, W] uint8 on the CPU; the network's mode is restored afterwards."""
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    parts = [network(chunk.to(device)).argmax(1).to("cpu", torch.uint8) for chunk in images.split(batch)]
    network.train(training)
    return torch.cat(parts)


def subject_dice(prediction: Tensor, truth: Tensor, subjects: list[str], classes: int) -> Tensor:
    """Dice [subjects, classes - 1] of each subject's stack of slices; NaN where a class is absent from the truth."""
    values = []
    for subject in sorted(set(subjects)):
        rows = [i for i, name in enumerate(subjects) if name == subject]
        stacks = [labels[rows][None, None].long() for labels in (prediction, truth)]
        values.append(compute_dice(*stacks, include_background=False, num_classes=classes))
    return torch.cat(values)


def dice_table(network: nn.Module, slices: Slices, positions: list[int]) -> dict[str, dict[str, float | None]]:
    """{zone: {class: Dice in percent, averaged over subjects, and "mean"}}, zone "all" first; None where undefined."""
    prediction = predict(network, slices.images[positions])
    truth = slices.labels[positions]
    table = {}
    for zone in ["all", *sorted({slices.zones[i] for i in positions} - {""})]:
        rows = [row for row, i in enumerate(positions) if zone in ("all", slices.zones[i])]
        names = [slices.subjects[positions[row]] for row in rows]
        per_class = 100 * subject_dice(prediction[rows], truth[rows], names, len(slices.classes)).nanmean(0)
        values = dict(zip(slices.classes[1:], per_class.tolist(), strict=True)) | {"mean": per_class.nanmean().item()}
        table[zone] = {name: None if math.isnan(value) else round(value, 3) for name, value in values.items()}
    return table
