"""Everything that is trained and measured for one seed."""

import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import nn

from examples.data.slices import Slices
from examples.data.splits import Split
from examples.evaluate import dice_table
from examples.files import read_json, write_atomically, write_json
from examples.networks import load_body
from examples.probes import linear_probe
from examples.settings import Settings
from examples.stages import (
    ImagePretraining,
    PixelPretraining,
    SemiSupervised,
    Stage,
    Supervised,
    SupervisedByClock,
    initial_network,
)
from examples.training import CHECKPOINT, DONE, rank, read_checkpoint, read_weights, train

PROBE = "probe.pt"
PARTS = {"val": "validation", "test": "test"}  # as results call them
SEGMENTERS = ("stage3", "supervised_iterations", "supervised_seconds")
PROBES = {"probe_random": None, "probe_stage2": "stage2", "probe_shuffled": "stage2_shuffled"}  # and their bodies


class Arms:
    """Everything trained for one seed: one folder each, with a checkpoint, done.json and its Dice."""

    def __init__(self, slices: Slices, split: Split, settings: Settings, seed: int, folder: Path, device: str):
        self.slices, self.split, self.settings = slices, split, settings
        self.seed, self.folder, self.device = seed, folder, device
        self.place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")

    def train(self, which: str, equal_seconds: bool = False) -> None:
        """Trains one stage ("1", "2", "3"), or all of them and the baselines ("all")."""
        first, second, third = self.settings.iterations
        if which in ("1", "all"):
            self.fit("stage1", ImagePretraining, first)
        if which in ("2", "all"):
            self.fit("stage2", PixelPretraining, second, start="stage1")
        if which in ("3", "all"):
            self.fit("stage3", SemiSupervised, third, start="stage2", body_lr=self.settings.pretrained_lr)
        if which == "all":
            self.fit("supervised_iterations", Supervised, first + second + third)
            self.fit("stage2_shuffled", PixelPretraining, second, start="stage1", shuffle_labels=True)
        if which == "all" and equal_seconds:
            budget = sum(read_json(self.folder / f"stage{number}" / DONE)["seconds"] for number in (1, 2, 3))
            self.fit("supervised_seconds", SupervisedByClock, 0, budget=budget)

    def fit(self, name: str, kind: Callable[..., Stage], iterations: int, start: str | None = None, **options) -> dict:
        """Trains one arm, from the body of the arm `start` where one is named, and prints a line."""
        L.seed_everything(self.seed, verbose=False)
        stage = kind(self.slices, self.split, self.settings, iterations, self.seed, **options)
        if start is not None:
            load_body(stage.network, read_weights(self.folder / start / CHECKPOINT, "network."))
        done = train(stage, self.folder / name, self.settings, self.device)
        self.tell(name, done["iterations"], done["seconds"])
        return done

    def tell(self, name: str, steps: int, seconds: float) -> None:
        """A line of what has been trained, from the first process."""
        if rank() == 0:
            print(f"seed {self.seed}  {name:22s} {steps:6d} steps {seconds:8.1f} s", flush=True)

    def probe(self) -> None:
        """Trains linear heads on three frozen bodies: random, after stage 2, after stage 2 on shuffled labels."""
        for name, body in PROBES.items():
            path = self.folder / name / PROBE
            if not path.is_file():
                started = time.perf_counter()
                network = initial_network(self.slices, self.settings, self.seed)
                if body is not None:
                    load_body(network, read_weights(self.folder / body / CHECKPOINT, "network."))
                network = network.to(self.place)
                head = linear_probe(network, self.slices, self.split, self.settings, self.seed, name)
                write_atomically(path, lambda file, head=head: torch.save(head.state_dict(), file))
                self.tell(name, self.settings.probe_iterations, time.perf_counter() - started)

    def networks(self) -> dict[str, nn.Module]:
        """The networks of all finished arms that segment, ready to predict."""
        found = {}
        for name in SEGMENTERS:
            if (self.folder / name / DONE).is_file():
                found[name] = read_weights(self.folder / name / CHECKPOINT, "teacher.module.")
        for name in PROBES:
            if (self.folder / name / PROBE).is_file():
                found[name] = read_checkpoint(self.folder / name / PROBE)
        networks = {}
        for name, state in found.items():
            networks[name] = initial_network(self.slices, self.settings, self.seed)
            networks[name].load_state_dict(state)
        return networks

    def evaluate(self, final: bool) -> None:
        """Writes the Dice of every arm on validation and, with --final, on test; each is computed once."""
        for part in ("val", "test") if final else ("val",):
            for name, network in self.networks().items():
                path = self.folder / name / f"dice_{part}.json"
                if not path.is_file():
                    table = dice_table(network.to(self.place), self.slices, getattr(self.split, part))
                    write_json(path, table)
                    mean = "-" if table["all"]["mean"] is None else f"{table['all']['mean']:.1f}"
                    print(f"seed {self.seed}  {name:22s} Dice on {PARTS[part]} {mean} %", flush=True)
