"""A linear head on a frozen body: how much of the segmentation the features already hold."""

import copy

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import nn

from examples.batches import Crops
from examples.data.slices import Slices
from examples.data.splits import Split
from examples.networks import HEAD
from examples.settings import Settings
from examples.training import Bar

VIEWS = 8  # intensity views of the labelled slices whose features are computed once and kept


def linear_probe(
    network: nn.Module, slices: Slices, split: Split, settings: Settings, seed: int, name: str
) -> nn.Module:
    """A copy of `network` whose fresh 1x1 head is trained on the labelled slices, CE + Dice, with the body frozen.

    `name` is what the bar is called.
    """
    torch.manual_seed(seed)
    probe = copy.deepcopy(network).eval().requires_grad_(False)
    head = probe.get_submodule(HEAD)
    head.reset_parameters()
    device = next(probe.parameters()).device
    rng = np.random.RandomState(seed)
    crops = Crops(slices, slices.size)
    positions = rng.choice(split.labelled, min(len(split.labelled), 8), replace=False)
    _, labels, views = crops.draw(rng, positions, VIEWS)
    kept: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        for view in views:
            probe(view.to(device))
    handle.remove()
    truth = labels[:, None].to(device)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.probe_iterations)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    bar = Bar(name, "step", settings.probe_iterations)
    for step in range(settings.probe_iterations):
        optimizer.zero_grad()
        loss_of(head(kept[step % VIEWS]), truth).backward()
        optimizer.step()
        schedule.step()
        bar.move_to(step + 1)
    bar.close()
    return probe
