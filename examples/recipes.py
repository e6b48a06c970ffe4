"""What the comparison trains: every arm is a chain of steps, and arms that share a step train it once per seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import nn

from examples.methods.contrast_term import ContrastTerm
from examples.methods.copy_paste import CopyPaste
from examples.methods.cross_pseudo import CrossPseudo
from examples.methods.entropy_guided import EntropyGuided
from examples.methods.fixmatch import FixMatch
from examples.methods.local_contrast import LocalContrast
from examples.methods.mean_teacher import MeanTeacher
from examples.methods.multiscale import Multiscale
from examples.methods.pccs import PCCS
from examples.methods.region_contrast import RegionContrast
from examples.methods.unimatch import UniMatch
from examples.settings import Settings
from examples.stages import ImagePretraining, PixelPretraining, Stage, Supervised, SupervisedByClock
from hpcloss import RegionPHPCLoss

SETTINGS = Settings(  # what the comparison's steps share; chosen on the validation subjects
    features=(8, 8, 16, 32, 64, 8),
    crop=(64, 80),
    augmentation="torch",
    image_batch=8,
    pixel_batch=4,
    labelled_batch=4,
    scratch_lr=1e-2,
    ramp=0.2,
    validate_every=200,
    checkpoint_every=100,
)


WEIGHTS = ("weight", (0.03, 0.1, 0.3))
CONFIDENCES = ("confidence", (0.8, 0.9, 0.95))


@dataclass(frozen=True)
class Iterations:
    """Steps of each kind of training. 490 supervised ones cost what 400 of the mean teacher do.

    After 800 the supervised start has converged (validation of the tuning seed); from one of 400 steps the mean teacher
    ends 6 Dice lower. Pre-training takes the place of as many of these steps: arms have equal iterations.
    """

    images: int = 200
    pixels: int = 200
    warm: int = 800
    second: int = 400
    supervised: int = 490


QUICK = Iterations(images=20, pixels=20, warm=160, second=60, supervised=74)


Choice = dict[str, float]  # of an arm's last step: "lr", and fields of the settings or options of the method


@dataclass(frozen=True)
class Step:
    """One training in a folder of its own, from the network of the step `start` where there is one."""

    name: str
    kind: Callable[..., Stage]
    iterations: int
    start: "Step | None" = None
    labels: str = "few"  # or "all": every training slice
    seconds_of: str | None = None  # instead of iterations: as many seconds as this arm's last step trained
    tried: "tuple[str, tuple[float, ...]] | None" = None  # what --tune chooses beside the learning rate
    base: str | None = None  # the arm that this one adds to: its choices hold here too, but for the learning rate
    chosen_as: str | None = None  # the arm whose choice this one takes

    @property
    def chain(self) -> "list[Step]":
        """This step and those before it, first to last."""
        return [*(self.start.chain if self.start else []), self]

    @property
    def choices(self) -> list[Choice]:
        """What --tune tries: six for every arm."""
        if self.tried is None:
            return [{"lr": rate} for rate in (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)]
        name, values = self.tried
        return [{"lr": rate, name: value} for rate, value in product((3e-3, 1e-2), values)]


def arms(iterations: Iterations, classes: int) -> dict[str, Step]:
    """Every arm by name, as its last step."""
    few = Step("warm", Supervised, iterations.warm)
    every = Step("warm-all-labels", Supervised, iterations.warm, labels="all")
    found = {
        "supervised": Step("supervised", Supervised, iterations.supervised, few),
        "all-labels": Step("all-labels", Supervised, iterations.supervised, every, labels="all"),
    }
    # The second stages that start from the same warm start; a method is one entry. Last: the arm that it adds to.
    methods: dict[str, tuple[Callable[..., Stage], tuple[str, tuple[float, ...]], str | None]] = {
        "mean-teacher": (MeanTeacher, ("consistency_weight", (3, 10, 30)), None),
        "fixmatch": (FixMatch, CONFIDENCES, None),
        "unimatch": (UniMatch, CONFIDENCES, None),
        "cross-pseudo": (CrossPseudo, ("weight", (0.1, 0.3, 1.0)), None),
        "copy-paste": (CopyPaste, ("weight", (0.25, 0.5, 1.0)), None),
        "region-contrast": (RegionContrast, WEIGHTS, "mean-teacher"),
        "local-contrast": (LocalContrast, WEIGHTS, None),
        "pccs": (PCCS, ("assignment_weight", (0.1, 0.3, 1.0)), "mean-teacher"),
        "entropy-guided": (EntropyGuided, WEIGHTS, "mean-teacher"),
        "multiscale": (Multiscale, WEIGHTS, "mean-teacher"),
        "contrast": (ContrastTerm, WEIGHTS, "fixmatch"),
        "contrast-labels": (partial(ContrastTerm, pixels="labels"), WEIGHTS, "fixmatch"),
    }
    found |= {
        name: Step(name, kind, iterations.second, few, tried=tried, base=base)
        for name, (kind, tried, base) in methods.items()
    }
    found["supervised-seconds"] = Step("supervised-seconds", SupervisedByClock, 0, few, seconds_of="mean-teacher")
    images = Step("images", ImagePretraining, iterations.images)
    starts = {"stage1": images}
    for name, loss in region_losses(classes).items():
        kind = partial(PixelPretraining, loss=loss)
        if name == "default":
            starts["stage2"] = Step("pixels-alone", kind, iterations.pixels)
        starts[f"stages12-{name}"] = Step(f"pixels-{name}", kind, iterations.pixels, images)
    for name, start in starts.items():
        left = iterations.warm - sum(step.iterations for step in start.chain)
        warm = Step(f"warm-{name}", Supervised, left, start)
        found[f"{name}+mt"] = Step(f"{name}+mt", MeanTeacher, iterations.second, warm, base="mean-teacher")
        if name == "stages12-default":
            found["pretrained-supervised"] = Step("pretrained-supervised", Supervised, iterations.supervised, warm)
            found["pretrained-fixmatch"] = Step(
                "pretrained-fixmatch", FixMatch, iterations.second, warm, tried=CONFIDENCES
            )
    return found


def studies(iterations: Iterations, classes: int) -> dict[str, Step]:
    """Arms that vary one thing of "contrast"; they run when they are named, with what was chosen for that arm.

    Those of a number of samples have embeddings at stride 4; they are compared with one another.
    """
    few = arms(iterations, classes)["contrast"].start
    coarse = {"layer": "upcat_3"}  # all pixels at stride 2 would be too many for a CPU
    options: dict[str, dict] = {f"contrast-k{k}": coarse | {"samples": k} for k in (8, 32, 128, 512)}
    options["contrast-all"] = coarse | {"samples": None}
    options |= {f"contrast-hardness{h:g}": {"hardness": h} for h in (0.5, 1.0, 2.0)}
    options |= {"contrast-published": {"hardness": "published"}}
    options |= {"contrast-hard-pixels": {"hard": True}, "contrast-memory": {"memory": True}}
    options |= {"contrast-head-lr": {"head_lr": 8.0}, "contrast-foreground": {"background": 0}}
    return {
        name: Step(name, partial(ContrastTerm, **own), iterations.second, few, chosen_as="contrast")
        for name, own in options.items()
    }


def region_losses(classes: int) -> dict[str, nn.Module]:
    """Stage 2's losses: every pixel contrast asked about, on samples of the same density."""
    shared = {"num_classes": classes, "background": None, "reduction": "class"}
    regions = shared | {"samples_per_class": 32}
    return {
        "hardness0": RegionPHPCLoss(16, hardness=0.0, **regions),
        "default": RegionPHPCLoss(16, **regions),
        "published": RegionPHPCLoss.published(region_size=16, **regions),
        "two-granularities": RegionPHPCLoss(16, local_size=8, **regions),
        "whole-region": RegionPHPCLoss(None, samples_per_class=20 * 32, **shared),  # a slice holds 20 regions of 16
    }
