"""One seed of the comparison: its labelled slices, and every arm trained and measured on them."""

import dataclasses
from pathlib import Path

import lightning as L
import torch
from filelock import FileLock
from torch import nn

from examples.data.slices import DataError, Slices
from examples.data.splits import Split
from examples.evaluate import segment
from examples.files import read_json, write_json
from examples.metrics import volume_table
from examples.networks import build_network, load_body
from examples.probes import linear_probe
from examples.recipes import Choice, Step
from examples.settings import Settings
from examples.training import CHECKPOINT, DONE, read_weights, train

TEACHER = "teacher.module."  # what predicts: the averaged weights
RANDOM = "random"  # the body of a probe that nothing has trained


class Trial:
    """One folder: a sub-folder per step with its checkpoint, done.json and, for arms, the scores on validation."""

    def __init__(
        self,
        slices: Slices,
        split: Split,
        settings: Settings,
        arms: dict[str, Step],
        seed: int,
        folder: Path,
        device: str,
    ):
        self.slices, self.split, self.settings, self.arms = slices, split, settings, arms
        self.seed, self.folder, self.device = seed, folder, device
        self.remember_split()

    def remember_split(self) -> None:
        """Writes the split, or checks that it is still the one that this seed was started with."""
        path, ids = self.folder / "split.json", self.split.ids(self.slices)
        if not path.is_file():
            write_json(path, ids)
        elif read_json(path) != ids:
            raise DataError(f"{path}: the data has changed since this run was started")

    def train(self, arm: str, choice: Choice, name: str | None = None) -> dict:
        """Trains what an arm's chain lacks, its last step with what was chosen (in the folder `name`)."""
        *before, last = self.arms[arm].chain
        for step in before:
            self.fit(step)
        return self.fit(dataclasses.replace(last, name=name or arm), choice)

    def fit(self, step: Step, choice: Choice | None = None) -> dict:
        """Trains one step from the network of the one before it. Arms may share it: one trains it, the others wait."""
        (self.folder / step.name).mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / step.name / ".lock"):
            if (self.folder / step.name / DONE).is_file():
                return read_json(self.folder / step.name / DONE)
            return self.fit_alone(step, choice or {})

    def fit_alone(self, step: Step, choice: Choice) -> dict:
        """`fit` of a step that nobody else is training; prints a line."""
        L.seed_everything(self.seed, verbose=False)
        given = {("scratch_lr" if name == "lr" else name): value for name, value in choice.items()}
        of_settings = {name: given.pop(name) for name in list(given) if hasattr(self.settings, name)}
        settings = dataclasses.replace(self.settings, **of_settings)
        split = self.split if step.labels == "few" else dataclasses.replace(self.split, labelled=self.split.train)
        budget = {} if step.seconds_of is None else {"budget": self.seconds_of(step)}
        stage = step.kind(self.slices, split, settings, step.iterations, self.seed, **budget, **given)
        stage.number = len(step.chain)  # keeps its random draws apart from those of the steps before it
        if step.start is not None:
            self.start_from(stage.network, step.start)
        done = train(stage, self.folder / step.name, settings, self.device)
        pace = 1000 * done["seconds"] / done["iterations"]
        steps = f"{done['iterations']:5d} steps {done['seconds']:7.1f} s  {pace:4.0f} ms a step"
        print(f"{self.folder.parent.name}  seed {self.seed}  {step.name:28s} {steps}", flush=True)
        return done

    def start_from(self, network: nn.Module, step: Step) -> None:
        """The whole averaged network of a step that segments; the body of one that does not."""
        checkpoint = self.folder / step.name / CHECKPOINT
        if whole := read_weights(checkpoint, TEACHER):
            network.load_state_dict(whole)
        else:
            load_body(network, read_weights(checkpoint, "network."))

    def seconds_of(self, step: Step) -> float:
        """The measured seconds of the other arm's last step that this one is to train for."""
        path = self.folder / str(step.seconds_of) / DONE
        if not path.is_file():
            raise DataError(f"{path}: {step.name} is measured by it; train that arm too")
        return read_json(path)["seconds"]

    def network(self, arm: str) -> nn.Module:
        """A trained arm's network."""
        network = build_network(self.slices.channels, len(self.slices.classes), self.settings.features)
        network.load_state_dict(read_weights(self.folder / arm / CHECKPOINT, TEACHER))
        return network.to(self.place)

    @property
    def place(self) -> torch.device:
        """Where networks predict."""
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def bodies(self, arms: list[str]) -> list[str]:
        """The pre-training steps of arms, which teach a body before there is a head, and a random one beside them."""
        steps = dict.fromkeys(step.name for arm in arms for step in self.arms[arm].chain[:-2])  # warm start, method
        return [RANDOM, *steps] if steps else []

    def probe(self, body: str) -> float:
        """Mean Dice on validation of a linear head on a frozen body, trained on the labelled slices; kept."""
        path = self.folder / body / "probe.json"
        if not path.is_file():
            L.seed_everything(self.seed, verbose=False)
            network = build_network(self.slices.channels, len(self.slices.classes), self.settings.features)
            if body != RANDOM:
                load_body(network, read_weights(self.folder / body / CHECKPOINT, "network."))
            head = linear_probe(network.to(self.place), self.slices, self.split, self.settings, self.seed, body)
            table = volume_table(segment(head, self.slices, self.split.val), self.slices, self.split.val)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"dice": table["dice"]["all"]["mean"]})
            print(f"{self.folder.parent.name}  seed {self.seed}  linear head on {body}", flush=True)
        return read_json(path)["dice"]

    def has_scores(self, arm: str) -> bool:
        """Whether an arm has been trained and measured on validation."""
        return (self.folder / arm / DONE).is_file() and (self.folder / arm / "validation.json").is_file()

    def scores(self, arm: str, part: str) -> dict:
        """Dice and HD95 on a part's volumes; those on validation are kept, those on test are for the caller to keep."""
        path = self.folder / arm / "validation.json"
        if part == "val" and path.is_file():
            return read_json(path)
        positions = getattr(self.split, part)
        table = volume_table(segment(self.network(arm), self.slices, positions), self.slices, positions)
        if part == "val":
            write_json(path, table)
        return table

    def cost(self, arm: str) -> dict:
        """Iterations and seconds of an arm's whole chain, shared steps included, and of each of its steps."""
        *before, _ = self.arms[arm].chain
        done = {name: read_json(self.folder / name / DONE) for name in [*(step.name for step in before), arm]}
        steps = {name: {key: entry[key] for key in ("iterations", "seconds")} for name, entry in done.items()}
        total = {key: round(sum(entry[key] for entry in steps.values()), 2) for key in ("iterations", "seconds")}
        return total | {"steps": steps}
