"""The three stages and the supervised baseline as Lightning modules: each owns its network, loss and batches."""

import math
import sys
import time
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from examples.batches import Batch, Crops, Steps
from examples.data.slices import Slices
from examples.data.splits import Split
from examples.evaluate import Maps, dice_table
from examples.networks import BOTTLENECK, HEAD, LAST, ImageProjector, build_network, encode, feature_swap
from examples.settings import Settings
from examples.warps import Warps
from hpcloss import FeatureTap, IHPCLoss, ProjectionHead, RegionPHPCLoss


class Stage(L.LightningModule):
    """What the stages share: AdamW with OneCycle, batches by step number, seconds and a curve that survive a kill."""

    number: int  # keeps the random draws of the stages apart

    def __init__(self, slices: Slices, split: Split, settings: Settings, iterations: int, seed: int):
        super().__init__()
        self.slices, self.split, self.settings = slices, split, settings
        self.iterations, self.seed = iterations, seed
        self.crops = (Warps if settings.augmentation == "torch" else Crops)(slices, settings.crop)
        self.network = build_network(slices.channels, len(slices.classes), settings.features, len(slices.size))
        self.seconds = 0.0
        self._started = 0.0
        self.curve: list[dict[str, float]] = []

    def draw(self, rng: np.random.RandomState) -> Batch:
        raise NotImplementedError

    def amount(self) -> tuple[float, float, str]:
        """How much is done, of how much, in which unit."""
        return self.trainer.global_step, self.iterations, "step"

    @property
    def schedule_steps(self) -> int:
        """The length of the learning rates' schedule."""
        return self.iterations

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, each with its largest learning rate."""
        raise NotImplementedError

    def configure_optimizers(self) -> dict[str, Any]:
        groups = self.parameter_groups()
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay)
        rise = 0.2 if self.schedule_steps != 5 else 0.3  # a fifth of 5 steps ends where it begins: a division by zero
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=self.schedule_steps, pct_start=rise
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        # The trainer asks anew every `checkpoint_every` steps, and after a resume: the step number says where to go on.
        first = self.trainer.global_step
        count = max(1, min(self.settings.checkpoint_every, self.iterations - first))
        return DataLoader(Steps(self.draw, (self.seed, self.number, self.global_rank), first, count), batch_size=None)

    def pick(self, rng: np.random.RandomState, positions: list[int], count: int) -> np.ndarray:
        """`count` positions, without repetition where there are enough."""
        return rng.choice(positions, count, replace=count > len(positions))

    def on_train_start(self) -> None:
        self._started = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        # For sampling inside the losses. By step, not by epoch: after a resume Lightning cuts the epochs elsewhere.
        torch.manual_seed(self.seed * 1_000_003 + self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self.seconds += time.perf_counter() - self._started
        if self.trainer.is_global_zero:
            self.validate()  # is no training time
        self._started = time.perf_counter()

    def validate(self) -> None:
        """Called after every `checkpoint_every` steps, before the checkpoint is written, in the first process alone."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"seconds": self.seconds, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds, self.curve = checkpoint["progress"]["seconds"], checkpoint["progress"]["curve"]


class ImagePretraining(Stage):
    """Stage 1: IHPC on two crops of unlabelled training slices; encoder and projection head are trained."""

    number = 1

    def __init__(self, *args: Any, loss: nn.Module | None = None):
        super().__init__(*args)
        self.projector = ImageProjector(self.settings.features[4], self.settings.embedding_dim)
        self.loss = loss or IHPCLoss(gather=True)

    def draw(self, rng: np.random.RandomState) -> Batch:
        positions = self.pick(rng, self.split.train, self.settings.image_batch)
        _, _, (first,) = self.crops.draw(rng, positions, views=1)
        _, _, (second,) = self.crops.draw(rng, positions, views=1)
        return {"first": first, "second": second, "planes": self.slices.planes[positions]}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        embeddings = self.projector(encode(self.network, torch.cat([batch["first"], batch["second"]])))
        # Slices of one plane show the same anatomy: they are no negatives of each other.
        loss = self.loss(*embeddings.chunk(2), groups=batch["planes"])
        self.log("stage1/loss", loss, prog_bar=True)
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        encoder = [p for name, p in self.network.named_parameters() if name.startswith(("conv_0", "down_"))]
        return [{"params": [*encoder, *self.projector.parameters()], "lr": self.settings.image_lr}]


class PixelPretraining(Stage):
    """Stage 2: region PHPC on two intensity views of labelled slices; encoder, decoder and projection head."""

    number = 2

    def __init__(self, *args: Any, shuffle_labels: bool = False, loss: nn.Module | None = None):
        super().__init__(*args)
        settings = self.settings
        self.projector = ProjectionHead(
            settings.features[5], settings.embedding_dim, spatial_dims=len(self.slices.size)
        )
        # Not a submodule: the network is registered once, under its own name.
        object.__setattr__(self, "tapped", FeatureTap(self.network, LAST))
        self.loss = loss or RegionPHPCLoss(
            settings.region_size,
            num_classes=len(self.slices.classes),
            samples_per_class=settings.samples_per_class,
            background=None,
            reduction="class",
            gather=True,
        )
        if shuffle_labels:
            self.crops.labels = shuffled(self.slices, self.seed)

    def draw(self, rng: np.random.RandomState) -> Batch:
        positions = self.pick(rng, self.split.labelled, self.settings.pixel_batch)
        _, labels, views = self.crops.draw(rng, positions, views=2)
        return {"images": torch.cat(views), "labels": torch.cat([labels, labels])}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        _, features = self.tapped(batch["images"])
        embeddings = self.projector(features)
        loss, stats = self.loss(embeddings, batch["labels"], return_stats=True)
        self.log("stage2/loss", loss, prog_bar=True)
        self.log_dict({f"stage2/{name}": value for name, value in stats.items()})
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        body = [p for name, p in self.network.named_parameters() if not name.startswith(HEAD)]
        return [{"params": [*body, *self.projector.parameters()], "lr": self.settings.pixel_lr}]


class Supervised(Stage):
    """The baseline: the same network, augmentation, CE + Dice and averaged weights, from labelled slices alone."""

    number = 3

    def __init__(self, *args: Any, body_lr: float | None = None):
        super().__init__(*args)
        self.body_lr = body_lr
        self.segmentation_loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        self.teacher = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema))
        self.teacher.requires_grad_(False)

    def draw(self, rng: np.random.RandomState) -> Batch:
        positions = self.pick(rng, self.split.labelled, 2 * self.settings.labelled_batch)
        _, labels, (view,) = self.crops.draw(rng, positions, views=1)
        return {"images": view, "labels": labels}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self.segmentation_loss(self.network(batch["images"]), batch["labels"][:, None])
        self.log("supervised/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.global_step == 0:  # the body may have been loaded after the copy was made
            self.teacher.module.load_state_dict(self.network.state_dict())

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        self.teacher.update_parameters(self.network)

    def validate(self) -> None:
        step, every = self.trainer.global_step, self.settings.validate_every
        last = self.curve[-1]["iteration"] if self.curve else 0
        done, total, _ = self.amount()
        if step // every > last // every or (last < step and done >= total):
            mean = dice_table(self.teacher, self.slices, self.split.val)["all"]["mean"]
            self.curve.append({"iteration": step, "seconds": round(self.seconds, 2), "dice": mean})
            self.log("validation/dice", mean or 0.0, rank_zero_only=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = self.network.get_submodule(HEAD)
        body = [p for name, p in self.network.named_parameters() if not name.startswith(HEAD)]
        if self.body_lr is None:
            return [{"params": [*body, *head.parameters()], "lr": self.settings.scratch_lr}]
        head_lr = self.settings.head_lr_factor * self.body_lr
        return [{"params": body, "lr": self.body_lr}, {"params": list(head.parameters()), "lr": head_lr}]


class SupervisedByClock(Supervised):
    """The baseline at equal seconds: it trains until the clock has counted `budget` seconds of training.

    The learning rates follow the same schedule, over these seconds; `iterations` is not looked at. A plan of steps from
    a speed measured before would not do: the speed is another when other processes come or go.
    """

    TICKS = 1000  # of the schedule

    def __init__(self, *args: Any, budget: float):
        super().__init__(*args)
        self.iterations, self.budget = sys.maxsize, max(budget, 1e-3)
        self.elapsed = 0.0

    @property
    def schedule_steps(self) -> int:
        return self.TICKS

    def amount(self) -> tuple[float, float, str]:
        return min(self.elapsed, self.budget), self.budget, "second"

    def on_train_start(self) -> None:
        super().on_train_start()
        self.elapsed = self.seconds

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        elapsed = self.seconds + time.perf_counter() - self._started
        self.elapsed = self.trainer.strategy.broadcast(elapsed)  # the first process's: all stop at one step
        scheduler.last_epoch = min(1.0, self.elapsed / self.budget) * (self.TICKS - 1) - 1  # and step() adds 1
        scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        super().on_train_batch_end(outputs, batch, index)
        if self.elapsed >= self.budget:
            self.trainer.should_stop = True


class SemiSupervised(Supervised):
    """Stage 3: a mean teacher's confident pseudo-labels, and two flows with swapped decoder features.

    Both flows are intensity views of the same crops. With labels: CE + Dice of both flows. Without: cross-entropy
    against the teacher's classes where it is sure, agreement of the flows' outputs and of their bottleneck embeddings,
    all three ramped up. The weights of these three are ours; the paper's are not known.
    """

    def __init__(self, *args: Any, body_lr: float | None = None):
        super().__init__(*args, body_lr=body_lr)
        object.__setattr__(self, "tapped", FeatureTap(self.network, BOTTLENECK))

    def draw(self, rng: np.random.RandomState) -> Batch:
        count = self.settings.labelled_batch
        _, labels, labelled = self.crops.draw(rng, self.pick(rng, self.split.labelled, count), views=2)
        plain, _, unlabelled = self.crops.draw(rng, self.pick(rng, self.split.train, count), views=2)
        flows = [torch.cat(pair) for pair in zip(labelled, unlabelled, strict=True)]
        return {"flows": torch.cat(flows), "labels": labels, "plain": plain}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        settings, count = self.settings, len(batch["labels"])
        with feature_swap(self.network):
            logits, bottleneck = self.tapped(batch["flows"])
        first, second = logits.chunk(2)
        segmentation = self.segmentation_loss(
            torch.cat([first[:count], second[:count]]), torch.cat([batch["labels"], batch["labels"]])[:, None]
        )
        with torch.no_grad():
            sureness, classes = self.teacher(batch["plain"]).softmax(1).max(1)
            sure = (sureness > settings.confidence).to(logits.dtype)
        pseudo = torch.stack(
            [(F.cross_entropy(f[count:], classes, reduction="none") * sure).mean() for f in (first, second)]
        )
        outputs = F.mse_loss(first.softmax(1), second.softmax(1))
        a, b = bottleneck.mean(tuple(range(2, bottleneck.ndim))).chunk(2)
        embeddings = 1 - F.cosine_similarity(a, b).mean()
        unlabelled = (
            settings.pseudo_weight * pseudo.mean()
            + settings.output_weight * outputs
            + settings.embedding_weight * embeddings
        )
        loss = segmentation + ramp_up(self.global_step / (settings.ramp * self.iterations)) * unlabelled
        # Means over processes, as the gradient is.
        self.log_dict({"stage3/segmentation": segmentation, "stage3/sure": sure.mean()}, prog_bar=True, sync_dist=True)
        terms = {"stage3/pseudo": pseudo.mean(), "stage3/outputs": outputs, "stage3/embeddings": embeddings}
        self.log_dict(terms, sync_dist=True)
        return loss


def ramp_up(progress: float) -> float:
    """exp(-5 (1 - t)^2) for t in [0, 1], then 1 (Laine & Aila)."""
    return math.exp(-5 * (1 - min(1.0, progress)) ** 2)


def shuffled(slices: Slices, seed: int) -> Maps:
    """Every image's label pixels, padding left alone, in a random order: the class shares stay, all else goes."""
    generator = torch.Generator().manual_seed(seed)
    positions = list(range(len(slices)))
    mixed = [label.clone() for label in slices.labels]
    for inside in slices.unpadded(mixed, positions):  # views
        inside[...] = inside.flatten()[torch.rand(inside.numel(), generator=generator).argsort()].view_as(inside)
    return torch.stack(mixed) if isinstance(slices.labels, Tensor) else mixed


def initial_network(slices: Slices, settings: Settings, seed: int) -> nn.Module:
    """The network before any training, the same for every arm of a seed."""
    torch.manual_seed(seed)
    return build_network(slices.channels, len(slices.classes), settings.features, len(slices.size))
