"""Dice by MONAI, per subject over all of its slices, per class."""

import math

import torch
from monai.inferers import sliding_window_inference
from monai.metrics import compute_dice
from torch import Tensor, nn

from examples.data.slices import Slices

Maps = Tensor | list[Tensor]  # label maps of slices [N, H, W], or of volumes


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Class ids [N, H, W] uint8 on the CPU; the network's mode is restored afterwards."""
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    parts = [network(chunk.to(device)).argmax(1).to("cpu", torch.uint8) for chunk in images.split(batch)]
    network.train(training)
    return torch.cat(parts)


@torch.no_grad()
def predict_volumes(network: nn.Module, images: list[Tensor], patch: tuple[int, ...]) -> list[Tensor]:
    """Class ids [X, Y, Z] uint8 on the CPU of each volume, by a window of this size that slides over it."""
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    scores = (
        sliding_window_inference(image[None].to(device), patch, 4, network, overlap=0.5, mode="gaussian")
        for image in images
    )
    predicted = [score[0].argmax(0).to("cpu", torch.uint8) for score in scores]
    network.train(training)
    return predicted


def segment(network: nn.Module, slices: Slices, positions: list[int]) -> list[Tensor]:
    """The predicted class ids of these slices or volumes, without padding, as `slices.truth` has them."""
    images, _ = slices.take(positions)
    maps = predict(network, images) if len(slices.size) == 2 else predict_volumes(network, images, slices.size)
    return slices.unpadded(maps, positions)


def subject_dice(prediction: Maps, truth: Maps, subjects: list[str], classes: int) -> Tensor:
    """Dice [subjects, classes - 1] over all images of each subject; NaN where a class is absent from the truth."""
    values = []
    for subject in sorted(set(subjects)):
        rows = [i for i, name in enumerate(subjects) if name == subject]
        stacks = [torch.cat([maps[i].flatten() for i in rows])[None, None].long() for maps in (prediction, truth)]
        values.append(compute_dice(*stacks, include_background=False, num_classes=classes))
    return torch.cat(values)


def dice_table(network: nn.Module, slices: Slices, positions: list[int]) -> dict[str, dict[str, float | None]]:
    """{zone: {class: Dice in percent, averaged over subjects, and "mean"}}, zone "all" first; None where undefined."""
    prediction, truth = segment(network, slices, positions), slices.truth(positions)
    table = {}
    for zone in ["all", *sorted({slices.zones[i] for i in positions} - {""})]:
        rows = [row for row, i in enumerate(positions) if zone in ("all", slices.zones[i])]
        names = [slices.subjects[positions[row]] for row in rows]
        pair = [[maps[row] for row in rows] for maps in (prediction, truth)]
        per_class = 100 * subject_dice(*pair, names, len(slices.classes)).nanmean(0)
        values = dict(zip(slices.classes[1:], per_class.tolist(), strict=True)) | {"mean": per_class.nanmean().item()}
        table[zone] = {name: None if math.isnan(value) else round(value, 3) for name, value in values.items()}
    return table
