"""Every loss at random configurations; then what long runs meet: memory, threads, worker processes, kills.

    make stress                                                          all of it
    python -m pytest tests/tools/stress.py --configurations 1000 --seed 7      fewer, and others
    python -m tests.tools.stress 1234                                    one configuration, as a failure names it

Configuration n is the same everywhere and always.
"""

import inspect
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from hpcloss.losses import entropy, local, multiscale, pixel, region
from hpcloss.losses.image import UNFILLED
from hpcloss.plan import partition, sampling
from hpcloss.reference.masked import reduce
from tests.tools.cases import LABELS, choice, draw_region_options, integers, rows
from tests.tools.losses import FAST, LOSSES, NAMES, ORACLE, Loss, Sizes
from tests.tools.numerics import BUDGETS, EXACT, LARGEST_ERROR

CHUNK = 100  # configurations of one test
KILLS = 20
NOWHERE = -(10**9)  # a label that is ignored, for what an oracle is to leave out
TEMPERATURES = (0.005, 0.01, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0, 10.0, 100.0)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ------------------------------------------------------------------------------------- what is drawn, from one number


class Case(NamedTuple):
    """A loss with everything but its tensors bound: fast(*inputs, *constants), differentiated by the inputs."""

    text: str
    fast: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    inputs: list[Tensor]
    constants: list[Tensor]
    options: dict


class Draw(random.Random):
    """Choices and tensors of one configuration."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__(seed)
        self.number, self.dtype = seed, dtype

    def tensor(self, *shape: int) -> Tensor:
        """Features: at random, all alike, nearly so, with rows of zeros; small and large."""
        self.number += 1
        x = rows(*shape, seed=self.number)
        kind = self.choice(["random"] * 5 + ["alike", "nearly alike", "zeros"])
        if kind == "zeros":
            x = x * (rows(shape[0], 1, *shape[2:], seed=-self.number) > 0)
        elif kind != "random" and x.numel():
            x = rows(1, shape[1], *[1] * (len(shape) - 2), seed=self.number) + x * (0.01 if kind[0] == "n" else 0.0)
        return self.layout((x * self.choice([1.0, 1.0, 1.5, 0.01])).to(self.dtype))

    def layout(self, x: Tensor) -> Tensor:
        """The same numbers with other strides."""
        kind = self.choice(["as it is", "as it is", "channels last", "every other", "flipped axes"])
        if kind == "channels last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if kind == "every other":
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == "flipped axes":
            return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
        return x

    def map_shape(self) -> tuple[int, ...]:
        """[B, D, *S] of at most 400 pixels; one of 30 has none."""
        while True:
            spatial = [self.choice([1, 2, 3, 4, 5, 7, 8, 13]) for _ in range(self.choice([1, 2, 2, 2, 3]))]
            batch = self.choice([1, 1, 2, 2, 3])
            if batch * math.prod(spatial) <= 400:
                break
        if self.random() < 1 / 30:
            empty = self.randrange(-1, len(spatial))
            batch, spatial = (0, spatial) if empty < 0 else (batch, [*spatial[:empty], 0, *spatial[empty + 1 :]])
        return (batch, self.dim(), *spatial)

    def dim(self) -> int:
        return self.choice([1, 2, 3, 5, 8, 16, 33])

    def labels(self, *shape: int, classes: int = 4) -> Tensor:
        """Class ids of any kind, many of them ignored, negative, huge or outside [0, classes)."""
        self.number += 1
        kind = self.choice(["classes"] * 4 + ["outside", *LABELS])
        if kind == "classes":
            return choice([*range(classes), -100, 255], *shape, seed=self.number)
        if kind == "outside":
            return choice([0, 1, classes, classes + 5, -7, 10**12, -(2**62)], *shape, seed=self.number)
        labels = LABELS[kind](shape, self.number) if math.prod(shape) > 1 else torch.full(shape, 1)
        return labels

    def spelling(self, labels: Tensor) -> Tensor:
        """The same labels of another resolution, with another axis, of another dtype."""
        if self.random() < 0.15:
            labels = labels.repeat_interleave(self.choice([2, 3]), self.randrange(1, labels.dim()))
        if self.random() < 0.3:
            labels = labels[:, None]
        fitting = [torch.int64]
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32):
            if torch.equal(labels.to(dtype).to(torch.int64), labels) and (labels.abs() < 2**24).all():
                fitting.append(dtype)
        return labels.to(self.choice(fitting))

    def temperature(self) -> dict:
        return {"temperature": self.choice(TEMPERATURES)}

    def reduction(self, *more: str) -> str:
        return self.choice(["mean", "sum", "none", *more])


@contextmanager
def packed_rows(module):
    """The pixels that the calls of `pack` in a module's loss read, in a list."""
    real, seen = module.pack, []

    def pack(features, order, live=None, **options):
        seen.append(order[: order.numel() if live is None else int(live)].long())
        return real(features, order, live, **options)

    with mock.patch.object(module, "pack", pack):
        yield seen


def only(labels: Tensor, pixels: Tensor) -> Tensor:
    """Labels of these pixels, all others ignored."""
    kept = torch.full_like(labels, NOWHERE)
    kept.view(-1)[pixels] = labels.reshape(-1)[pixels]
    return kept


def draw(seed: int) -> Case:
    """Configuration number `seed`."""
    torch.manual_seed(seed)
    name = NAMES[seed % len(NAMES)]
    at = Draw(seed, DTYPES[seed // len(NAMES) % len(DTYPES)])
    makers = {"region_phpc": region_case, "region_supcon": region_case, "supcon": supcon_case, "infonce": infonce_case}
    makers |= dict.fromkeys(("ntxent", "ihpc", "hard_negative_nce"), two_view_case)
    makers |= {"entropy_guided_contrast": entropy_case, "multiscale_contrast": multiscale_case}
    makers |= {"pixel_contrast": pixel_case, "local_contrast": local_case}
    makers |= {"prototype_contrast": prototype_case, "prototype_assignment": assignment_case}
    fast, oracle, inputs, constants, options, *sampling = makers.get(name, any_case)(at, name)
    shapes = ", ".join(str(list(x.shape)) for x in [*inputs, *constants])
    everything = options | dict(*sampling)
    text = f"{name} {at.dtype} {shapes} {everything}"
    if at.random() < 0.2 and options.get("hardness", 0.0) is not None:
        text += " learnt temperature"
        learnt = torch.tensor(options["temperature"])  # float32, as a parameter is

        def with_temperature(loss):
            def call(temperature, *tensors):
                options["temperature"] = temperature  # which the losses above read when they are called
                return loss(*tensors)

            return call

        fast, oracle, inputs = with_temperature(fast), with_temperature(oracle), [learnt, *inputs]

    def seeded(*tensors):
        torch.manual_seed(seed)
        return fast(*tensors)

    return Case(text, seeded, oracle, inputs, constants, everything)


def region_case(at: Draw, name: str):
    shape = at.map_shape()
    x, classes = at.tensor(*shape), at.choice([None, 2, 3, 5])
    labels = at.labels(shape[0], *shape[2:], classes=classes or 4)
    options = draw_region_options(at.number, shape) | at.temperature()
    if name == "region_supcon":
        own = ("region_size", "temperature", "background", "ignore_index", "per_image", "normalize", "reduction")
        options = {key: options[key] for key in own}
    ignored = options["ignore_index"]
    ignored = (ignored,) if isinstance(ignored, int) else ignored
    if options["background"] in ignored:
        options["background"] = None
    chosen = {"num_classes": classes}
    if classes and at.random() < 0.4:
        chosen["samples_per_class"] = at.choice([1, 2, 5, 1000])
    if at.random() < 0.3:
        chosen["max_regions"] = at.choice([1, 2, 100])
    given, seen = at.spelling(labels), []

    def fast(x):
        with packed_rows(region) as calls:
            value = FAST[name](x, given, **options, **chosen)
        seen[:] = calls[:1]
        return value

    def oracle(x):
        y = labels
        if classes:
            y = torch.where((y >= 0) & (y < classes), y, NOWHERE)
        if len(chosen) > 1:
            y = only(y, seen[0])
        return ORACLE[name](x, y, **{**options, "ignore_index": (*ignored, NOWHERE)})

    return fast, oracle, [x], [], options, chosen


def supcon_case(at: Draw, name: str):
    count, dim = at.choice([0, 1, 2, 9, 31, 130]), at.dim()
    labels, x = at.labels(count), at.tensor(count, dim)
    options = {**at.temperature(), "form": at.choice(["out", "in"]), "normalize": at.random() < 0.7}
    options |= {"reduction": at.reduction("class"), "ignore_index": at.choice([(-100, -1), (), 1, (0, 255)])}
    keys, key_labels = [], None
    if at.random() < 0.5:
        more = at.choice([0, 1, 5, 150])
        keys, key_labels = [at.tensor(more, dim)], at.labels(more)

    def call(loss):
        return lambda x, k=None: loss(x, labels, k, key_labels, **options)

    return call(FAST[name]), call(ORACLE[name]), [x, *keys], [], options


def infonce_case(at: Draw, name: str):
    count, dim, more = at.choice([0, 1, 2, 9, 31, 130]), at.dim(), at.choice([None, 0, 1, 40])
    inputs = [at.tensor(count, dim), at.tensor(count, dim)] + ([] if more is None else [at.tensor(more, dim)])
    options = {**at.temperature(), "normalize": at.random() < 0.7, "reduction": at.reduction()}
    options["symmetric"] = more is None and at.random() < 0.5
    return lambda *x: FAST[name](*x, **options), lambda *x: ORACLE[name](*x, **options), inputs, [], options


def two_view_case(at: Draw, name: str):
    count, dim = at.choice([0, 1, 2, 9, 31, 130]), at.dim()
    inputs, constants = [at.tensor(count, dim), at.tensor(count, dim)], []
    options = {**at.temperature(), "normalize": at.random() < 0.7, "reduction": at.reduction()}
    if name == "hard_negative_nce":
        options |= {"beta": at.choice([0.0, 0.5, 1.0, 2.0]), "tau_plus": at.choice([0.0, 0.1, 0.6])}
        options["normalize"] = True  # the lowest value is that of unit rows
    groups = bank_groups = None
    if name == "ihpc":
        options |= {"beta": at.choice([None, None, 0.0, 0.1, 0.9]), "hardness": at.choice([0.0, 1.0, -20.0, 50.0])}
        groups = at.choice([None, at.labels(count)])
        if at.random() < 0.5:
            more = at.choice([1, 7, 60])
            constants = [torch.nn.functional.normalize(rows(more, dim, seed=at.number), dim=1).to(at.dtype)]
            bank_groups = torch.where(rows(more, seed=at.number) > 0.5, UNFILLED, integers(4, more, seed=at.number))

    def fast(a, b, bank=None):
        more = {} if name != "ihpc" else {"groups": groups, "bank": bank, "bank_groups": bank_groups}
        return FAST[name](a, b, **options, **more)

    def oracle(a, b, bank=None):
        more = {} if name != "ihpc" else {"groups": groups}
        if bank is not None:
            there = bank_groups != UNFILLED
            stored = torch.nn.functional.normalize(bank[there], dim=1) if options["normalize"] else bank[there]
            more |= {"bank": stored, "bank_groups": bank_groups[there]}
        return ORACLE[name](a, b, **options, **more)

    return fast, oracle, inputs, constants, options


def probabilities(at: Draw, *shape: int) -> Tensor:
    return torch.softmax(2 * rows(*shape, seed=at.number + 17), 1).to(at.dtype)


def entropy_case(at: Draw, name: str):
    shape, classes = at.map_shape(), at.choice([1, 2, 4])
    x, probs = at.tensor(*shape), probabilities(at, shape[0], classes, *shape[2:])
    labels = at.choice([None, at.labels(shape[0], *shape[2:], classes=classes)])
    options = {**at.temperature(), "threshold": at.choice(["mean", 0.0, 0.6, 0.8, 1.0])}
    options |= {"reduction": at.reduction("class"), "denominator": at.choice(["own", "all"])}
    options["detach_keys"] = at.random() < 0.5
    options |= {"entropy_classes": at.random() < 0.3, "ignore_index": at.choice([(-100, -1, 255), (), 1])}
    options["symmetric"] = not options["entropy_classes"] and at.random() < 0.4
    options["normalize"] = at.random() < 0.7
    chosen = {}
    if options["threshold"] != "mean" and at.random() < 0.5:  # the mean is over all pixels, also those not drawn
        chosen["samples_per_class"] = at.choice([1, 3, 1000])
    given, seen = None if labels is None else at.spelling(labels), []

    def fast(x, probs):
        with packed_rows(entropy) as calls:
            value = FAST[name](x, probs, given, **options, **chosen)
        seen[:] = calls
        return value

    def oracle(x, probs):
        y = probs.argmax(1) if labels is None else labels
        if not chosen:
            return ORACLE[name](x, probs, y, **options)
        return ORACLE[name](x, probs, only(y, seen[0]), **{**options, "ignore_index": NOWHERE})

    return fast, oracle, [x], [probs], options, chosen


def multiscale_case(at: Draw, name: str):
    shape, classes = at.map_shape(), at.choice([2, 3, 5])
    labels = at.choice([None, at.labels(shape[0], *shape[2:], classes=classes)])
    options = {**at.temperature(), "patch_size": at.choice([1, 2, 3, 100, (2, 5)])}
    options |= {"pixel_weight": at.choice([0.5, 1.0]), "patch_weight": at.choice([0.0, 1.0, 2.0])}
    options |= {"num_classes": None if labels is None else classes, "ignore_index": at.choice([(-100, -1, 255), (), 1])}
    options["patch_positives"] = "instance" if labels is None else at.choice(["instance", "majority"])
    options["normalize"] = at.random() < 0.7
    samples, seen = at.choice([None, 2, 1000]), []
    given = None if labels is None else at.spelling(labels)

    def fast(a, b):
        with packed_rows(multiscale) as calls:
            value = FAST[name](a, b, given, samples_per_class=samples, **options)
        seen[:] = calls
        return value

    def oracle(a, b):
        if labels is None or samples is None:
            return ORACLE[name](a, b, labels, **options)
        patches = ORACLE[name](a, b, labels, **{**options, "pixel_weight": 0.0})
        # Of each branch its own pixels are drawn: as one image of both branches they may be ignored one by one.
        together, pair = torch.cat([a, b]), torch.cat([labels, labels])
        pixels = {name: options[name] for name in ("temperature", "normalize")}
        pixels |= {"num_classes": classes, "ignore_index": NOWHERE}
        drawn = ORACLE["pixel_contrast"](together, only(pair, seen[-1]), **pixels)
        return patches + options["pixel_weight"] * drawn

    return fast, oracle, [at.tensor(*shape), at.tensor(*shape)], [], options, {"samples_per_class": samples}


def pixel_case(at: Draw, name: str):
    shape, classes = at.map_shape(), at.choice([2, 3, 5])
    x, labels = at.tensor(*shape), at.labels(shape[0], *shape[2:], classes=classes)
    options = {**at.temperature(), "num_classes": classes, "normalize": at.random() < 0.7}
    options |= {"reduction": at.reduction("class"), "background": at.choice([None, 0, 1])}
    options["ignore_index"] = at.choice([(-100, -1, 255), ()])
    samples, seen, given = at.choice([None, None, 1, 3, 1000]), [], at.spelling(labels)
    predictions = at.choice([None, integers(classes, *labels.shape)])

    def fast(x):
        with packed_rows(pixel) as calls:
            value = FAST[name](x, given, predictions, samples_per_class=samples, **options)
        seen[:] = calls
        return value

    def oracle(x):
        if samples is None:
            return ORACLE[name](x, labels, **options)
        return ORACLE[name](x, only(labels, seen[0]), **{**options, "ignore_index": NOWHERE})

    return fast, oracle, [x], [], options, {"samples_per_class": samples}


def local_case(at: Draw, name: str):
    shape, classes = at.map_shape(), at.choice([2, 3, 5])
    x, labels = at.tensor(*shape), at.labels(shape[0], *shape[2:], classes=classes)
    partner = at.choice([None, integers(shape[0] + 2, shape[0]) - 1])
    options = {**at.temperature(), "num_classes": classes, "background": at.choice([None, 0, 1])}
    options["normalize"] = at.random() < 0.7
    reduction, samples, seen, given = at.reduction("class"), at.choice([None, 1, 3, 1000]), [], at.spelling(labels)

    def fast(x):
        with packed_rows(local) as calls:
            value = FAST[name](x, given, partner, samples_per_class=samples, reduction=reduction, **options)
        seen[:] = calls
        return value

    def oracle(x):
        if samples is None:
            return ORACLE[name](x, labels, partner, reduction=reduction, **options)
        each = ORACLE[name](x, labels, partner, reduction="none", **options)  # means are of all pixels, drawn or not
        counted = torch.zeros(labels.numel(), dtype=torch.bool)
        counted[seen[-1]] = True
        loss = reduce(torch.where(counted, each.reshape(-1), 0.0), counted, reduction, {"class": labels.reshape(-1)})
        return loss.view(labels.shape) if reduction == "none" else loss

    return fast, oracle, [x], [], options, {"reduction": reduction, "samples_per_class": samples}


def prototype_case(at: Draw, name: str):
    count, dim = at.choice([0, 1, 2, 9, 31, 130]), at.dim()
    x, labels = at.tensor(count, dim), at.labels(count)
    probs = at.choice([[], [probabilities(at, count, 3)]])
    options = {**at.temperature(), "hardness": at.choice([None, 0.0, 4.0, -10.0]), "reduction": at.reduction()}
    options |= {"detach_weights": at.random() < 0.5, "ignore_index": at.choice([(-100, -1), (), 1])}
    options["normalize"] = at.random() < 0.7

    def call(loss):
        return lambda x, probs=None: loss(x, labels, probs, **options)

    return call(FAST[name]), call(ORACLE[name]), [x], probs, options


def assignment_case(at: Draw, name: str):
    shape, classes = at.map_shape(), at.choice([1, 3, 5])
    x, labels = at.tensor(*shape), at.labels(shape[0], *shape[2:], classes=classes)
    prototypes = rows(classes, at.choice([1, 2, 4]), shape[1], seed=at.number)
    prototypes = prototypes * (rows(*prototypes.shape[:2], 1, seed=-at.number) > -1)  # some are not there
    constants = [prototypes.to(at.dtype)] + at.choice([[], [at.tensor(*shape)]])
    options = {**at.temperature(), "iterations": at.choice([1, 2, 4]), "epsilon": at.choice([0.05, 0.3, 1.0])}
    options |= {"reduction": at.reduction("class"), "ignore_index": at.choice([(-100, -1, 255), (), 1])}
    given = at.spelling(labels)
    fast = lambda x, *constants: FAST[name](x, given, *constants, **options)  # noqa: E731
    oracle = lambda x, *constants: ORACLE[name](x, labels, *constants, **options)  # noqa: E731
    return fast, oracle, [x], constants, options


def any_case(at: Draw, name: str):
    """A loss without a maker of its own: small inputs, and some of the options that change its value."""
    loss = LOSSES[name]
    sizes = Sizes(at.choice([1, 2, 3]), (at.choice([1, 5, 8]), 6), at.choice([1, 2, 31]), 7, at.dtype, at.number)
    first, *rest = loss.inputs(sizes).values()
    known = inspect.signature(ORACLE[name]).parameters
    some = {option: value for option, value in loss.changed.items() if option in known and at.random() < 0.3}
    options = {key: value for key, value in loss.required.items() if key in known} | some | at.temperature()
    fast = lambda x: FAST[name](x, *rest, **{**loss.required, **options})  # noqa: E731
    return fast, lambda x: ORACLE[name](x, *rest, **options), [first], [], options


# ----------------------------------------------------------------------------------------------------- what must hold


def run(loss: Callable[..., Tensor], inputs: list[Tensor], constants: list[Tensor], weight: float = 1.0):
    """The value and the gradients of the inputs, for an upstream gradient of order 1 times `weight`, in one list."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(*inputs, *constants)
    upstream = torch.ones((), dtype=torch.float64)
    if value.dim():
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(value, inputs, weight * upstream.to(value.dtype), materialize_grads=True)
    return [value.detach(), *grads]


def check(case: Case) -> None:
    """The loss is the oracle's in float64, and in the dtype of its inputs within the budget of that dtype."""
    wide = [x.double() for x in case.inputs], [x.double() for x in case.constants]
    found = run(case.fast, *wide)
    if not case.inputs[-1].numel():
        assert all((x == 0).all() for x in found), "nothing counts, but it is not 0"
        return
    exact = run(case.oracle, *wide)
    floors, logit = rounding(case, torch.float64)
    for number, (one, right, floor) in enumerate(zip(found, exact, floors, strict=True)):
        compare(number, one, [], right, floor + logit * largest(right), torch.float64)
    dtype = case.inputs[-1].dtype
    if dtype == torch.float64:
        return
    # Weights that bring the gradients to order 1, as a loss scaler does: fp16 has no numbers below 6e-8.
    floors, logit = rounding(case, torch.float32)
    weight = 2.0 ** -round(math.log2(max(map(max, zip(map(largest, exact[1:]), floors[1:])))))
    found = run(case.fast, case.inputs, case.constants, weight)
    exact = [exact[0], *(weight * x for x in exact[1:])]
    floors = [floors[0], *(weight * x for x in floors[1:])]
    plain = [run(case.oracle, *moved, weight) for moved in neighbours(case)]
    for number, (one, right, floor, *near) in enumerate(zip(found, exact, floors, *plain, strict=True)):
        kept = dtype if number and one.dim() else torch.float32
        compare(number, one, [x.to(kept) for x in near], right, floor + logit * largest(right), kept)


def compare(number: int, found: Tensor, plain: list[Tensor], right: Tensor, rounded: float, dtype: torch.dtype) -> None:
    """The error is within the budget of the dtype, given plain computations, or what rounding the logits explains."""
    what = f"gradient {number}" if number else "value"
    assert found.dtype == dtype and found.shape == right.shape, f"{what}: {found.dtype}, {tuple(found.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    error, size = largest(found.double() - right), largest(right)
    if dtype == torch.float64:
        allowed = EXACT * size + rounded
    else:
        budget = BUDGETS["grad" if number else "loss", dtype]
        worst = max([largest(x.double() - right) for x in plain if x.isfinite().all()], default=0.0)
        allowed = budget.factor * worst + budget.ulps * torch.finfo(dtype).eps * size
        allowed = min(allowed + rounded, max(LARGEST_ERROR * size, rounded))
    assert error <= allowed, f"{what}: error {error:.1e}, allowed {allowed:.1e}, largest entry {size:.1e}"


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rounding(case: Case, dtype: torch.dtype) -> tuple[list[float], float]:
    """What rounding logits explains: errors of value and gradients where they vanish, and a relative one of weights.

    Logits l are off by l eps, and so are weights exp(l - lse), relatively. A value is a difference of logits weighed by
    exp(-hardness s); a gradient one of weights times 1 / temperature, times a norm or, of normalised rows, over a norm.
    """
    norms = torch.cat([torch.linalg.vector_norm(x.double(), dim=1).reshape(-1) for x in case.inputs if x.dim()])
    norms = norms[norms > 1e-12]
    most, least = max([1.0, *norms.tolist()]), min([1.0, *norms.tolist()])
    options = case.options
    normalized, hardness = options.get("normalize", True), abs(options.get("hardness", 0.0) or 0.0)
    similarity = 1.0 if normalized else most**2
    # What similarities are multiplied by. HardNegativeNCE: by 1 + beta more; hardness None: by 1 / temperature again.
    times = 1 + (options.get("beta") or 0.0) + ("hardness" in options and options["hardness"] is None)
    scale = 1 + hardness + times / options["temperature"]
    unit = 8 * torch.finfo(dtype).eps
    logit, added = unit * scale * similarity, options.get("reduction") in ("sum", "none")
    weights, mixed = 1 + scale * similarity / 8, 1 + hardness * similarity / 16
    anchors = len(norms) if added else 1  # whose gradients meet in a key
    of_rows = unit * scale * weights * mixed * (1 / least if normalized else most)
    if dtype == torch.float64:  # in float32 a plain computation says how equal errors of equal rows add up
        of_rows *= 1 + anchors / 4
    of_temperature = scale * weights * logit * mixed * anchors
    value = logit * mixed * (1 if options.get("reduction") == "none" else anchors)
    return [value, *(of_rows if x.dim() else of_temperature for x in case.inputs)], logit


def neighbours(case: Case) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Inputs and constants in float32, as they are and twice moved by up to half a unit in the last place.

    A plain computation may hit a value by chance. What rounds unit rows to float32 moves them as much.
    """
    generator, constants = torch.Generator().manual_seed(3), [x.float() for x in case.constants]

    def moved(x: Tensor, by: float) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        return (x.double() * (1 + by * noise)).float()

    eps = torch.finfo(torch.float32).eps
    return [([moved(x, by) for x in case.inputs], constants) for by in (0.0, 2 * eps, 2 * eps)]


def failure(number: int) -> str | None:
    """What is wrong with a configuration, in one line that says how to see it again."""
    text = "could not be drawn"
    try:
        case = draw(number)
        text = case.text
        check(case)
    except Exception as error:
        return f"python -m tests.tools.stress {number}   # {type(error).__name__}: {error} | {text}".replace("\n", " ")
    return None


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        first = metafunc.config.getoption("seed") * 10**6
        last = first + metafunc.config.getoption("configurations")
        metafunc.parametrize("first,last", [(n, min(n + CHUNK, last)) for n in range(first, last, CHUNK)])


def test_random_configurations(first, last, record_property):
    failures = [found for found in map(failure, range(first, last)) if found]
    record_property("configurations", last - first)
    record_property("failures", len(failures))
    assert not failures, "\n".join(failures)


# ------------------------------------------------------------------------------------------------ a call of every loss


class Call(NamedTuple):
    """A loss and its tensors by name; `used` says which rows or pixels of a tensor take part, where not all do."""

    loss: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    used: dict[str, Tensor]
    options: dict

    def __call__(self, **changed):
        return self.loss(**{**self.tensors, **self.options, **changed})

    def gradients(self, **changed) -> dict[str, Tensor]:
        """The value, and by name the gradients of all tensors that have one."""
        tensors = {name: x.detach().requires_grad_() for name, x in {**self.tensors, **changed}.items()}
        value = self(**tensors)
        value.backward()
        return {"value": value.detach(), **{name: x.grad for name, x in tensors.items() if x.grad is not None}}


def equal(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return these.keys() == those.keys() and all(torch.equal(x, those[name]) for name, x in these.items())


def every_call(dtype: torch.dtype = torch.float32, scale: float = 1.0, size: int = 6) -> dict[str, Call]:
    """One call of each loss, with rows and pixels that take no part wherever a loss knows some."""
    count, more = 4 * size, 5 * size
    labels, ids = choice([0, 1, 2, 255], 2, size, 5), choice([0, 1, 2, -1], count)
    key_ids = choice([0, 1, -1], more, seed=1)
    x, y = (scale * rows(2, 8, size, 5, seed=n).to(dtype) for n in (0, 1))
    a, b, c = (scale * rows(many, 8, seed=n).to(dtype) for n, many in enumerate((count, count, more)))
    pixels, alive, keys = labels != 255, ids != -1, key_ids != -1
    probs, prototypes = torch.softmax(2 * rows(2, 3, size, 5, seed=2), 1).to(dtype), rows(3, 2, 8, seed=3).to(dtype)
    classes = {"labels": labels, "num_classes": 3}
    bank = {"bank": c, "bank_groups": torch.where(keys, torch.arange(more), UNFILLED), "groups": torch.arange(count)}
    given = {
        "region_phpc": ({"features": x}, {"features": pixels}, {"labels": labels, "region_size": 4}),
        "region_supcon": ({"features": x}, {"features": pixels}, classes | {"region_size": 4}),
        "supcon": ({"embeddings": a, "keys": c}, {"embeddings": alive, "keys": keys},
                   {"labels": ids, "key_labels": key_ids}),
        "ntxent": ({"view1": a, "view2": b}, {}, {}),
        "infonce": ({"query": a, "positive": b, "negatives": c}, {}, {}),
        "ihpc": ({"view1": a, "view2": b, "bank": c}, {"bank": keys}, {k: v for k, v in bank.items() if k != "bank"}),
        "hard_negative_nce": ({"view1": a, "view2": b}, {}, {}),
        "entropy_guided_contrast": ({"features": x, "probs": probs}, {"features": pixels, "probs": pixels},
                                    {"labels": labels}),
        "multiscale_contrast": ({"features1": x, "features2": y}, {"features1": pixels, "features2": pixels},
                                classes | {"patch_size": 2, "samples_per_class": None}),
        "pixel_contrast": ({"features": x}, {"features": pixels}, classes | {"samples_per_class": None}),
        # No anchors are drawn, as that takes torch's generator, which threads share.
        "local_contrast": ({"features": x}, {"features": pixels & (labels != 0)},
                           classes | {"samples_per_class": None}),
        "prototype_contrast": ({"prototypes": a, "probs": torch.softmax(b[:, :3], 1)},
                               {"prototypes": alive, "probs": alive}, {"labels": ids}),
        "prototype_assignment": ({"features": x, "prototypes": prototypes, "teacher_features": y},
                                 {"features": pixels, "teacher_features": pixels}, {"labels": labels}),
    }  # fmt: skip
    sizes = Sizes(2, (size, 5), count, 8, dtype)
    return {name: Call(FAST[name], *given.get(name) or any_call(LOSSES[name], sizes, scale)) for name in NAMES}


def any_call(loss: Loss, sizes: Sizes, scale: float):
    """Of the parts of a `Call`: where labels are ignored, the first input takes no part."""
    inputs = loss.inputs(sizes)
    first = next(iter(inputs))
    if "labels" in inputs:  # -1 is ignored by losses of maps and of rows
        inputs["labels"] = torch.where(inputs["labels"] == 255, -1, inputs["labels"])
    tensors = {key: x for key, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    tensors[first] = scale * tensors[first]
    used = {} if loss.kind == "views" else {first: inputs["labels"] != -1}
    return tensors, used, {key: x for key, x in inputs.items() if key not in tensors} | loss.required


# ------------------------------------------------------------------------------------------------------------ long runs


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", NAMES)
def test_memory_stays_flat_over_2000_steps(name):
    """One tensor of the rows kept a step is 7 kB at least, 11 MB in all; allocators take 2 MB until they settle."""
    call = every_call(size=60)[name]
    for step in range(2001):
        call.gradients()
        if step == 500:
            before = resident_bytes()
    assert resident_bytes() - before < 4e6


@pytest.mark.parametrize("name", NAMES)
def test_four_threads_get_what_one_gets(name):
    calls = [every_call(scale=scale)[name] for scale in (1.0, 1.5, 2.0, 0.5)]
    alone = [call.gradients() for call in calls]

    def often(number: int) -> bool:
        every = (calls[number].gradients() for _ in range(50))
        return all(equal(found, alone[number]) for found in every)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(4)))


class Losses(torch.utils.data.Dataset):
    """The value of each loss, and a sample that the native library draws."""

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(index)
        sorted_rows = partition.class_sort(integers(3, 5000, seed=index), num_classes=3)
        drawn, _ = sampling.sample(sorted_rows.order, sorted_rows.offsets, 7, num_pixels=5000)
        return every_call()[NAMES[index]](), drawn


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_get_what_the_process_gets(start):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a fork of a process that has a pool of them
    try:
        torch.rand(2000, 2000).sum()
        here = [Losses()[index] for index in range(len(NAMES))]
        loader = torch.utils.data.DataLoader(Losses(), None, num_workers=2, multiprocessing_context=start, timeout=120)
        there = list(loader)
    finally:
        torch.set_num_threads(threads)
    assert len(there) == len(here)
    for (value, drawn), (right, expected) in zip(there, here, strict=True):
        assert torch.equal(value, right) and torch.equal(drawn, expected)


def train(data: str, out: str) -> None:
    """The three stages of the example, small, going on with what is there."""
    from examples.arms import Arms
    from examples.data.folders import read_folder
    from examples.data.splits import draw_split
    from examples.settings import Settings
    from examples.training import quiet

    quiet()
    torch.set_num_threads(1)
    batches = {"image_batch": 4, "pixel_batch": 2, "labelled_batch": 1}
    settings = Settings(iterations=(6, 6, 6), crop=(32, 32), features=(8,) * 6, checkpoint_every=2, **batches)
    slices = read_folder(Path(data))
    arms = Arms(slices, draw_split(slices, 2, None, 0), settings, 0, Path(out) / "seed0", "cpu")
    for stage in "123":
        arms.train(stage)


def test_training_killed_at_20_moments_ends_with_the_same_weights(tmp_path):
    pytest.importorskip("lightning", reason="the examples need the `examples` extra")
    from tests.tools.small_folders import write_msd

    data = str(write_msd(tmp_path / "msd", cases=8))
    # Children of a server that has imported everything: each starts training at once.
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["examples.arms", "examples.data.folders", "lightning"])

    def start(out):
        process = context.Process(target=train, args=(data, str(tmp_path / out)))
        process.start()
        return process

    def weights(out, stage):
        return torch.load(tmp_path / out / "seed0" / stage / "last.ckpt", weights_only=True)["state_dict"]

    for out in ("warm", "whole"):  # the first one waits for the server
        began, process = time.monotonic(), start(out)
        process.join()
        assert process.exitcode == 0
    seconds, kills = time.monotonic() - began, 0
    while True:
        process = start("killed")
        process.join(moments.uniform(0, 0.5 * seconds) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0, f"a run that was killed {kills} times does not go on"
        for stage in ("stage1", "stage2", "stage3"):
            expected, found = weights("whole", stage), weights("killed", stage)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected), f"{stage}, after {kills} kills"
        if kills == KILLS:
            break
        shutil.rmtree(tmp_path / "killed")  # and once more from the start


if __name__ == "__main__":
    torch.set_num_threads(1)
    one = draw(int(sys.argv[1]))
    print(one.text)
    check(one)
    print("holds")
