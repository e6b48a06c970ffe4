"""A mean teacher in the shape of SSL4MIS's `train_*_2D.py` scripts, and what such a script needs for region contrast.

SSL4MIS (Luo et al., Medical Image Analysis 2022 and later) trains on `.h5` slices; its arguments have their meaning
here: `labeled_bs` images of a batch have labels, the others follow the teacher, whose weight rises with
`consistency_rampup`. Written anew on the readers of `examples/data`, it is a stand-in for a script of yours. Slices are
cropped or padded to `patch_size`, not resized, and `labeled_num` counts patients, in the order of the list:

    python -m examples.integrations.ssl4mis --root_path ../data/ACDC --labeled_num 7

An import and two lines are new, and `outputs = model(images)` has become `outputs, features = tap(images)`; the four
end with `# hpcloss`. The loss is taken on the decoder's features as they are. A projection head
(`hpcloss.ProjectionHead`) costs two lines more: its creation, and its parameters in the optimiser.
"""

import argparse
import copy
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet

from examples.data.folders import read_folder
from examples.evaluate import segment, subject_dice
from examples.stages import ramp_up
from examples.warps import Warps
from hpcloss import FeatureTap, RegionPHPCLoss  # hpcloss

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--root_path", type=Path, required=True, help="of slices/*.h5, train_slices.list, val.list")
parser.add_argument("--max_iterations", type=int, default=30000)
parser.add_argument("--batch_size", type=int, default=24)
parser.add_argument("--labeled_bs", type=int, default=12, help="labelled images of a batch")
parser.add_argument("--labeled_num", type=int, default=7, help="labelled patients")
parser.add_argument("--patch_size", type=int, nargs=2, default=(256, 256))
parser.add_argument("--base_lr", type=float, default=0.01)
parser.add_argument("--ema_decay", type=float, default=0.99)
parser.add_argument("--consistency", type=float, default=0.1)
parser.add_argument("--consistency_rampup", type=float, default=200.0, help="in units of 150 iterations")
parser.add_argument("--seed", type=int, default=1337)


def update_ema_variables(model, ema_model, alpha, iteration):
    """The teacher: a running mean of the student's weights, a plain mean in the first steps."""
    alpha = min(1 - 1 / (iteration + 1), alpha)
    for teacher, student in zip(ema_model.parameters(), model.parameters(), strict=True):
        teacher.data.lerp_(student.data, 1 - alpha)


def train(args):
    """Returns the network, and the Dice of each class, a mean over the validation patients."""
    torch.manual_seed(args.seed)
    rng = np.random.RandomState(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    slices = read_folder(args.root_path, size=tuple(args.patch_size))
    train_set = np.array(slices.of_part("train"))
    patients = list(dict.fromkeys(slices.subjects[i] for i in train_set))[: args.labeled_num]
    has_label = np.array([slices.subjects[i] in patients for i in train_set])
    labelled, unlabelled = train_set[has_label], train_set[~has_label]
    classes = len(slices.classes)
    augment = Warps(slices, tuple(args.patch_size))

    model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=classes, features=(16, 32, 64, 128, 256, 16))
    model = model.to(device)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    tap, contrast = FeatureTap(model, "upcat_1"), RegionPHPCLoss(num_classes=classes, samples_per_class=32)  # hpcloss
    optimizer = torch.optim.SGD(model.parameters(), lr=args.base_lr, momentum=0.9, weight_decay=1e-4)
    dice_loss = DiceLoss(to_onehot_y=True, softmax=True)

    for iteration in range(args.max_iterations):
        chosen = rng.choice(labelled, args.labeled_bs), rng.choice(unlabelled, args.batch_size - args.labeled_bs)
        images, labels, _ = augment.draw(rng, np.concatenate(chosen), views=0)
        images, labels = images.to(device), labels[: args.labeled_bs].to(device)
        noisy = images[args.labeled_bs :] + (0.1 * torch.randn_like(images[args.labeled_bs :])).clamp(-0.2, 0.2)

        outputs, features = tap(images)  # hpcloss
        with torch.no_grad():
            ema_output = ema_model(noisy)
        supervised = outputs[: args.labeled_bs]
        loss_ce = F.cross_entropy(supervised, labels)
        loss_dice = dice_loss(supervised, labels[:, None])
        consistency_weight = args.consistency * ramp_up(iteration // 150 / max(args.consistency_rampup, 1e-9))
        consistency_loss = F.mse_loss(outputs[args.labeled_bs :].softmax(1), ema_output.softmax(1))
        loss = 0.5 * (loss_ce + loss_dice) + consistency_weight * consistency_loss
        loss = loss + consistency_weight * contrast(features[: args.labeled_bs], labels)  # hpcloss

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema_variables(model, ema_model, args.ema_decay, iteration)
        for group in optimizer.param_groups:
            group["lr"] = args.base_lr * (1 - iteration / args.max_iterations) ** 0.9
        if iteration % 200 == 0:
            logging.info("iteration %d: loss %.4f, ce %.4f, dice %.4f", iteration, loss, loss_ce, loss_dice)

    held_out = slices.of_part("val")
    subjects = [slices.subjects[i] for i in held_out]
    dice = subject_dice(segment(model, slices, held_out), slices.truth(held_out), subjects, classes).nanmean(0)
    logging.info("validation Dice %s", " ".join(f"{value:.4f}" for value in dice))
    return model, dice


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())
