"""Region contrast in a plain MONAI loop: 3-D patches, DiceCELoss, sliding-window inference.

    python -m examples.integrations.monai_loop Task04_Hippocampus --steps 2000

reads a Decathlon folder (dataset.json, imagesTr, labelsTr), trains on four fifths of its subjects and prints the Dice
of the others. What hpcloss adds: a tap, a head (in the optimiser, too), a loss, and the sum of the two losses.
"""

import argparse
import json
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader, load_decathlon_datalist
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import BasicUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandScaleIntensityd,
    SpatialPadd,
)
from monai.utils import set_determinism

from examples.data.layout import subject_of
from hpcloss import FeatureTap, ProjectionHead, RegionPHPCLoss

KEYS = ("image", "label")


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 48, 48), help="at least 32, multiples of 16")
    parser.add_argument("--features", type=int, nargs=6, default=(16, 32, 64, 128, 256, 16))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_determinism(0)

    index = options.folder / "dataset.json"
    classes = len(json.loads(index.read_text())["labels"])
    cases = load_decathlon_datalist(index, is_segmentation=True, data_list_key="training")
    subjects = [subject_of(Path(case["image"]).name.partition(".")[0]) for case in cases]
    apart = set(sorted(set(subjects))[::5])  # whole subjects: frames of one are too alike
    held_out, training = ([c for c, s in zip(cases, subjects) if (s in apart) == held] for held in (True, False))
    load = [LoadImaged(KEYS), EnsureChannelFirstd(KEYS), NormalizeIntensityd("image")]
    draw = [
        SpatialPadd(KEYS, options.patch),
        RandCropByPosNegLabeld(KEYS, "label", options.patch, num_samples=2),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        RandScaleIntensityd("image", factors=0.3, prob=0.8),
    ]
    batches = DataLoader(CacheDataset(training, Compose(load + draw), progress=False), batch_size=2, shuffle=True)

    network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=classes, features=options.features)
    tapped = FeatureTap(network, "upcat_2").to(device)  # the last block but one: half the resolution
    head = ProjectionHead(options.features[1], dim=64, spatial_dims=3).to(device)
    segmentation = DiceCELoss(to_onehot_y=True, softmax=True)
    contrast = RegionPHPCLoss(region_size=12, num_classes=classes, samples_per_class=64)
    optimiser = torch.optim.AdamW([*tapped.parameters(), *head.parameters()], lr=2e-3)

    log: dict[str, list[float]] = {"segmentation": [], "contrast": [], "dice": []}
    step = 0
    while step < options.steps:
        for batch in batches:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            logits, features = tapped(images)
            supervised, contrastive = segmentation(logits, labels), contrast(head(features), labels)
            loss = supervised + 0.1 * min(1.0, 5 * step / options.steps) * contrastive
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % 50 == 0:  # turning tensors into numbers waits for the device
                log["segmentation"].append(supervised.item())
                log["contrast"].append(contrastive.item())
                print(f"step {step}: segmentation {supervised.item():.3f}, contrast {contrastive.item():.3f}")
            step += 1
            if step == options.steps:
                break

    dice = DiceMetric(include_background=False, num_classes=classes, reduction="mean_batch")
    network.eval()
    with torch.no_grad():
        for case in CacheDataset(held_out, Compose(load), progress=False):
            image, label = (case[key][None].to(device) for key in KEYS)
            logits = sliding_window_inference(image, options.patch, 4, network, overlap=0.5)  # the bare network
            dice(logits.argmax(1, keepdim=True), label)
    log["dice"] = dice.aggregate().tolist()
    print("Dice of", len(held_out), "held-out cases, by class:", *(f"{value:.3f}" for value in log["dice"]))
    return log


if __name__ == "__main__":
    main()
