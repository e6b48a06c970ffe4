"""Trains one stage with Lightning so that a kill at any moment costs at most the steps since the last checkpoint."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from tqdm import tqdm

from examples.data.slices import DataError
from examples.files import read_json, write_json
from examples.settings import Settings
from examples.stages import Stage

CHECKPOINT = "last.ckpt"
DONE = "done.json"


def quiet() -> None:
    """Lightning's advice about workers and loggers is not about this trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|monai|torch.optim.lr_scheduler")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def rank() -> int:
    """0, or the number of a helper process (of torchrun, or of Lightning for --devices): only rank 0 measures, writes
    and reports."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Bar:
    """How much of a training is done: a bar in a terminal, elsewhere a line a minute."""

    def __init__(self, name: str, unit: str, total: float, done: float = 0, shown: bool = True):
        self.name, self.unit, self.total, self.done, self.shown = name, unit, total, done, shown
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} " + unit + "s [{elapsed}<{remaining}]"
        hidden = not (shown and sys.stderr.isatty())
        self.bar = tqdm(
            desc=name, total=total, initial=done, disable=hidden, dynamic_ncols=True, leave=False, bar_format=form
        )
        self.said = time.monotonic()

    def move_to(self, done: float) -> None:
        """Says that this much of the total is done."""
        self.bar.update(done - self.done)
        self.done = done
        if self.shown and not sys.stderr.isatty() and time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            print(f"{self.name}: {self.unit} {done:.0f} of {self.total:.0f}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


class Progress(L.Callback):
    """The bar of a stage."""

    def __init__(self, name: str):
        self.name = name

    def on_train_start(self, trainer: L.Trainer, module: Stage) -> None:
        done, total, unit = module.amount()
        self.bar = Bar(self.name, unit, total, done, trainer.is_global_zero)

    def on_train_batch_end(self, trainer: L.Trainer, module: Stage, *_: object) -> None:
        self.bar.move_to(module.amount()[0])

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):  # a stage that was done already has none
            self.bar.close()


def train(stage: Stage, folder: Path, settings: Settings, device: str) -> dict:
    """Trains `stage` in `folder`, going on from its checkpoint where there is one, and returns {iterations, seconds,
    curve}. A folder whose stage is complete is left as it is."""
    if (folder / DONE).is_file():
        return read_json(folder / DONE)
    checkpoint = folder / CHECKPOINT
    if checkpoint.is_file():
        read_checkpoint(checkpoint)  # a damaged file is named here, not in the middle of Lightning
    trainer = L.Trainer(
        accelerator=device,
        devices=settings.devices,
        strategy="ddp_find_unused_parameters_true" if settings.devices > 1 else "auto",
        max_steps=stage.iterations,
        max_epochs=-1,  # an epoch is the steps between two checkpoints
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,  # the batches differ by rank already
        callbacks=[
            ModelCheckpoint(
                folder,
                Path(CHECKPOINT).stem,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
            Progress(folder.name),
        ],
        enable_progress_bar=False,  # Lightning's counts epochs, of which there is no number here
        logger=TensorBoardLogger(
            folder.parent.parent, name="tensorboard", version=f"{folder.parent.name}/{folder.name}"
        ),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    try:
        trainer.fit(stage, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C and of SIGTERM
        raise KeyboardInterrupt from stop
    if trainer.is_global_zero:
        done = {"iterations": trainer.global_step, "seconds": round(stage.seconds, 2), "curve": stage.curve}
        write_json(folder / DONE, done)
    trainer.strategy.barrier()
    return read_json(folder / DONE)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's content, tensors and plain values only. Raises DataError where it is missing or damaged."""
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; run the stage before this one first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(f"{path}: not a readable checkpoint; remove it to start this stage again") from error


def read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The part of a stage's weights whose names begin with `prefix`, without it."""
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
