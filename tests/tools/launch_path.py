"""Losses through Triton's own launch path, on a machine without a GPU. Run as a program it serves a `Machine`.

Everything between a loss and the driver is the real thing: the backend, Triton's binder, compiler, loader and launcher.
Below them is tests/tools/cuda_driver.c, which checks launches and runs nothing. Tensors are on the CPU. What torch says
of its devices is made up: that there is one, which part it is, and that its stream is 0.

What this cannot see: what kernels compute (all results are whatever the memory held), memory that they read, tensors on
another device, the operations of torch and of the native library on a GPU, and a driver's own limits of registers.
"""

from __future__ import annotations

import contextlib
import cProfile
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import pstats
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import hpcloss
from benchmarks.peers import eager_supcon
from hpcloss.primitives import rows as row_primitives
from tests.tools.cases import choice, rows
from tests.tools.losses import LOSSES, Loss

HERE = Path(__file__).parent
DIM = 64
CLASSES = 4
# Rows of a call. The first two make all kernels: block sums start at 512 rows.
FIRST_SIZES, SIZES = (96, 1000), (100, 128, 4097)


# ------------------------------------------------------------------------------------------------------- the losses


class Case(NamedTuple):
    """A loss of a public class and what it is called with, for N rows of a dtype: leaves, then the other arguments."""

    loss: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int, torch.dtype], tuple[list[torch.Tensor], dict[str, Any]]]
    options: frozenset[str]


def case(loss: str, inputs: Any, *, by: str = "", **options: Any) -> Case:
    """by: the classmethod that makes it. A temperature "learnt" is a parameter."""

    def make() -> torch.nn.Module:
        given = dict(options)
        if given.get("temperature") == "learnt":
            given["temperature"] = torch.nn.Parameter(torch.tensor(0.1))
        constructor = getattr(hpcloss, loss)
        return (getattr(constructor, by) if by else constructor)(**given, backend="triton")

    return Case(loss, make, inputs, frozenset(options))


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return rows(*shape, seed=seed, dtype=dtype).requires_grad_()


def vectors(n: int, dtype: torch.dtype, keys: int = 0, probs: bool = False) -> Any:
    """Labelled rows, and other rows as keys; or with the probabilities of prototypes."""
    given = {"labels": choice([0, 1, 1, 2, -1], n)}
    if keys:
        given |= {"keys": rows(n + keys, DIM, seed=1, dtype=dtype), "key_labels": choice([0, 1, 2], n + keys, seed=1)}
    if probs:
        given["probs"] = torch.softmax(rows(n, CLASSES, dtype=dtype), 1)
    return [leaf(n, DIM, dtype=dtype)], given


def views(n: int, dtype: torch.dtype, negatives: int = 0, groups: int = 0, **others: Any) -> Any:
    leaves = [leaf(n, DIM, dtype=dtype, seed=seed) for seed in range(2)]
    given = {name: make(leaves[0]) for name, make in others.items()}
    if negatives:
        given["negatives"] = rows(n + negatives, DIM, seed=2, dtype=dtype)
    if groups:
        given["groups"] = torch.arange(n) % groups
    return leaves, given


SHAPES = {96: (8, 12), 100: (10, 10), 128: (16, 8), 1000: (25, 40), 4097: (17, 241)}


def maps(
    n: int, dtype: torch.dtype, batch: int = 1, layout: str = "first", dims: int = 2, branches: int = 1, **others: Any
) -> Any:
    """A map of N pixels in each image, of 2 N in three dimensions.

    layout: channels "first" or "last"; "part": of a larger map; "odd": of memory that starts at an odd entry.
    """
    shape = {1: (n,), 2: SHAPES[n], 3: (*SHAPES[n], 2)}[dims]
    leaves = []
    for seed in range(branches):
        z = rows(batch, DIM, *shape, seed=seed, dtype=dtype)
        if layout == "last":
            z = z.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "part":
            whole = rows(batch, DIM + 3, *(size + 1 for size in shape), seed=seed, dtype=dtype)
            z = whole[(slice(None), slice(DIM), *map(slice, shape))]
        elif layout == "odd":
            z = rows(z.numel() + 1, seed=seed, dtype=dtype)[1:].view(z.shape)
        leaves.append(z.requires_grad_())
    given = {name: make(leaves[0]) for name, make in others.items()}
    return leaves, {"labels": choice([0, 1, 2, 3, 255], batch, *shape)} | given


def some(inputs: Any, **options: Any) -> Any:
    return functools.partial(inputs, **options)


def queue_of(z: torch.Tensor) -> hpcloss.EmbeddingQueue:
    """Filled as in training, from pixels and from means of segments, which launches as well."""
    queue = hpcloss.EmbeddingQueue(CLASSES, 30, DIM)
    labels = choice([0, 1, 2], *[z.shape[0], *z.shape[2:]])
    queue.enqueue(z.detach(), labels, samples_per_class=5)
    queue.enqueue_means(z.detach(), labels)
    return queue.to(z.dtype)


def queue_of_views(z: torch.Tensor) -> hpcloss.EmbeddingQueue:
    """One class, partly filled."""
    queue = hpcloss.EmbeddingQueue(1, 50, DIM)
    queue.enqueue(z.detach()[:20])
    return queue.to(z.dtype)


def probabilities(z: torch.Tensor) -> torch.Tensor:
    return torch.softmax(rows(z.shape[0], CLASSES, *z.shape[2:], seed=5, dtype=z.dtype), 1)


def bank(z: torch.Tensor) -> torch.Tensor:
    return rows(CLASSES, 3, DIM, seed=6, dtype=z.dtype)


REGION, PIXEL, LOCAL = "RegionPHPCLoss", "PixelContrastLoss", "LocalContrastLoss"
TWO_BRANCHES = some(maps, branches=2)
WITH_PROBS = some(maps, probs=probabilities)
CASES = {
    "region": case(REGION, maps, region_size=4, num_classes=CLASSES),
    "region, batch": case(REGION, some(maps, batch=2), region_size=4),
    "region, channels last": case(REGION, some(maps, batch=2, layout="last"), region_size=4, num_classes=CLASSES),
    "region, part of a map": case(REGION, some(maps, batch=2, layout="part"), region_size=4, num_classes=CLASSES),
    "region, odd memory": case(REGION, some(maps, batch=2, layout="odd"), region_size=4, num_classes=CLASSES),
    "region, 1-D": case(REGION, some(maps, dims=1), region_size=16),
    "region, 3-D": case(REGION, some(maps, batch=2, dims=3), region_size=4),
    "region, 3-D, part": case(REGION, some(maps, batch=2, dims=3, layout="part"), region_size=4),
    "region, whole map": case(REGION, maps, region_size=None, per_image=True, reduction="class"),
    "region, learnt": case(REGION, maps, region_size=4, temperature="learnt", hardness=2.0),
    "region, cold": case(REGION, maps, region_size=4, temperature=0.01),
    "region, hardness 0": case(REGION, maps, region_size=4, hardness=0.0),
    "region, weights": case(REGION, maps, region_size=4, detach_weights=False),
    "region, weights, learnt": case(REGION, maps, region_size=4, detach_weights=False, temperature="learnt"),
    "region, raw": case(REGION, maps, region_size=4, normalize=False, temperature=8.0),
    "region, raw weights": case(REGION, maps, region_size=4, normalize=False, temperature=8.0, detach_weights=False),
    "region, published": case(REGION, maps, by="published", region_size=4, beta=0.2),
    "region, published, learnt": case(REGION, maps, by="published", region_size=4, temperature="learnt"),
    "region, published, weights": case(
        REGION, maps, by="published", region_size=4, hardness=1.0, detach_weights=False
    ),
    "region, all": case(REGION, maps, region_size=4, denominator="all", background=None),
    "region, negatives": case(REGION, maps, region_size=4, denominator="negatives", hardness=-20.0),
    "region, all, hard": case(REGION, maps, region_size=4, denominator="all", hardness=2.0),
    "region, all, weights": case(REGION, maps, region_size=4, denominator="all", detach_weights=False),
    "region, local": case(REGION, some(maps, batch=2), region_size=4, local_size=2, num_classes=CLASSES),
    "region, samples": case(REGION, maps, region_size=4, num_classes=CLASSES, samples_per_class=3),
    "region, some regions": case(REGION, maps, region_size=4, num_classes=CLASSES, max_regions=2),
    "region, stats": case(REGION, some(maps, return_stats=lambda z: True), region_size=4),
    "region supcon": case("RegionSupConLoss", maps, region_size=4),
    "region supcon, learnt": case("RegionSupConLoss", maps, region_size=4, temperature="learnt"),
    "region supcon, stats": case("RegionSupConLoss", some(maps, return_stats=lambda z: True), region_size=4),
    "region supcon, raw": case("RegionSupConLoss", maps, region_size=4, normalize=False, temperature=8.0),
    "region supcon, samples": case(
        "RegionSupConLoss", maps, region_size=4, num_classes=CLASSES, samples_per_class=3, max_regions=2, per_image=True
    ),
    "supcon": case("SupConLoss", vectors),
    "supcon, none": case("SupConLoss", vectors, reduction="none"),
    "supcon, learnt": case("SupConLoss", vectors, temperature="learnt"),
    "supcon, raw": case("SupConLoss", vectors, normalize=False, temperature=8.0),
    "supcon, in": case("SupConLoss", vectors, form="in"),
    "supcon, keys": case("SupConLoss", some(vectors, keys=33)),
    "supcon, keys, learnt": case("SupConLoss", some(vectors, keys=33), temperature="learnt"),
    "ntxent": case("NTXentLoss", views),
    "ntxent, learnt": case("NTXentLoss", views, temperature="learnt"),
    "ntxent, raw": case("NTXentLoss", views, normalize=False, temperature=8.0),
    "infonce": case("InfoNCELoss", views),
    "infonce, learnable": case("InfoNCELoss", views, learnable=True),
    "infonce, symmetric": case("InfoNCELoss", views, symmetric=True),
    "infonce, symmetric, learnable": case("InfoNCELoss", views, symmetric=True, learnable=True),
    "infonce, learnt": case("InfoNCELoss", views, temperature="learnt"),
    "infonce, raw": case("InfoNCELoss", views, normalize=False, temperature=8.0),
    "infonce, negatives": case("InfoNCELoss", some(views, negatives=33)),
    "hard negatives": case("HardNegativeNCELoss", views),
    "hard negatives, none": case("HardNegativeNCELoss", views, beta=0.0, tau_plus=0.0),
    "hard negatives, learnt": case("HardNegativeNCELoss", views, temperature="learnt"),
    "hard negatives, raw": case("HardNegativeNCELoss", views, normalize=False, temperature=8.0),
    "ihpc": case("IHPCLoss", views, hardness=2.0),
    "ihpc, learnt": case("IHPCLoss", views, temperature="learnt"),
    "ihpc, raw": case("IHPCLoss", views, normalize=False, temperature=8.0),
    "ihpc, queue": case("IHPCLoss", some(views, queue=queue_of_views)),
    "ihpc, groups": case("IHPCLoss", some(views, groups=5)),
    "ihpc, published": case("IHPCLoss", views, by="published", beta=0.2),
    "entropy": case("EntropyGuidedContrastLoss", WITH_PROBS),
    "entropy, learnt": case("EntropyGuidedContrastLoss", WITH_PROBS, temperature="learnt", threshold=0.5),
    "entropy, both": case("EntropyGuidedContrastLoss", WITH_PROBS, symmetric=True, detach_keys=False),
    "entropy, classes": case("EntropyGuidedContrastLoss", WITH_PROBS, entropy_classes=True),
    "entropy, all": case("EntropyGuidedContrastLoss", WITH_PROBS, denominator="all", samples_per_class=5),
    "entropy, raw": case("EntropyGuidedContrastLoss", WITH_PROBS, normalize=False, temperature=8.0),
    "multiscale": case("MultiscaleContrastLoss", TWO_BRANCHES, patch_size=(2, 4), num_classes=CLASSES),
    "multiscale, learnt": case(
        "MultiscaleContrastLoss", TWO_BRANCHES, patch_size=4, num_classes=CLASSES, temperature="learnt"
    ),
    "multiscale, raw": case(
        "MultiscaleContrastLoss", TWO_BRANCHES, patch_size=4, num_classes=CLASSES, normalize=False, temperature=8.0
    ),
    "multiscale, majority": case(
        "MultiscaleContrastLoss", TWO_BRANCHES, patch_size=4, num_classes=CLASSES, patch_positives="majority",
        samples_per_class=None, patch_weight=0.5, pixel_weight=2.0,
    ),
    "pixel": case(PIXEL, maps, num_classes=CLASSES, samples_per_class=9),
    "pixel, predictions": case(
        PIXEL, some(maps, predictions=lambda z: choice([0, 1], len(z), *z.shape[2:])), num_classes=CLASSES
    ),
    "pixel, learnt": case(PIXEL, maps, num_classes=CLASSES, temperature="learnt"),
    "pixel, raw": case(PIXEL, maps, num_classes=CLASSES, normalize=False, temperature=8.0),
    "pixel, every": case(PIXEL, maps, num_classes=CLASSES, samples_per_class=None, background=0),
    "pixel, queue": case(PIXEL, some(maps, queue=queue_of), num_classes=CLASSES, samples_per_class=9),
    "pixel, queue, learnt": case(PIXEL, some(maps, queue=queue_of), num_classes=CLASSES, temperature="learnt"),
    "local": case(LOCAL, some(maps, batch=2), num_classes=CLASSES),
    "local, partner": case(
        LOCAL, some(maps, batch=2, partner=lambda z: torch.tensor([1, 0])), num_classes=CLASSES, samples_per_class=None
    ),
    "local, learnt": case(LOCAL, maps, num_classes=CLASSES, temperature="learnt"),
    "local, raw": case(LOCAL, maps, num_classes=CLASSES, normalize=False, temperature=8.0),
    "prototypes": case("PrototypeContrastLoss", some(vectors, probs=True)),
    "prototypes, learnt": case("PrototypeContrastLoss", vectors, temperature="learnt", hardness=1.0),
    "prototypes, constant": case("PrototypeContrastLoss", vectors, detach_weights=True),
    "prototypes, raw": case("PrototypeContrastLoss", vectors, normalize=False, temperature=8.0),
    "assignment": case("PrototypeAssignmentLoss", some(maps, prototypes=bank), iterations=3, epsilon=0.1),
    "assignment, learnt": case(
        "PrototypeAssignmentLoss", some(maps, prototypes=bank, teacher_features=torch.Tensor.detach),
        temperature="learnt",
    ),
}  # fmt: skip
# Options that decide what torch makes of the kernels' results; `gather` has a test of its own.
NO_LAUNCH = {"reduction", "ignore_index", "background", "check_labels", "check_finite", "backend", "gather"}


def cases_of(name: str, loss: Loss) -> Iterator[tuple[str, Case]]:
    """Of a loss without a case above: as it is, with a learnt temperature, and with each option that may matter."""
    inputs, public = {"map": maps, "rows": vectors, "views": views}[loss.kind], loss.module.__name__
    yield name, case(public, inputs, **loss.required)
    yield f"{name}, learnt", case(public, inputs, **loss.required, temperature="learnt")
    for option in loss.changed.keys() - NO_LAUNCH - {"temperature"}:
        yield f"{name}, {option}", case(public, inputs, **{**loss.required, option: loss.changed[option]})


for name, loss in LOSSES.items():
    if loss.module.__name__ not in {one.loss for one in CASES.values()}:
        CASES.update(cases_of(name, loss))


# ------------------------------------------------------------------------------------------------- in the child process


def device(capability: int) -> contextlib.ExitStack:
    """Until it is closed torch has one GPU of this compute capability, and the backend takes tensors of the CPU."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from hpcloss.backends.triton import probe, trial

    stack = contextlib.ExitStack()
    answers = {
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: divmod(capability, 10),
        "get_device_name": lambda device=None: f"sm_{capability}",
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, answer))
    stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))
    why_not = probe.why_not
    stack.enter_context(mock.patch.object(probe, "why_not", lambda device, index: why_not("cuda", 0)))
    # No kernel runs, so all that a trial of them compares is wrong. `tried` is the one request that lets it compare.
    stack.enter_context(mock.patch.object(trial, "disagreement", functools.wraps(trial.disagreement)(lambda *_: "")))
    # What takes no backend asks for the best.
    resolve = row_primitives.resolve
    to_triton = {"auto": "triton"}
    stack.enter_context(
        mock.patch.object(row_primitives, "resolve", lambda name, tensor: resolve(to_triton.get(name, name), tensor))
    )
    driver.set_active(CudaDriver())
    stack.callback(driver.set_active, None)
    return stack


class Driver:
    """The stand-in, which the loader has found under the name of the real one."""

    def __init__(self, capability: int) -> None:
        from triton.compiler import CompiledKernel

        from tests.tools.offline import SHARED_LIMIT

        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.stand_in_be(capability, SHARED_LIMIT[capability])
        load = CompiledKernel._init_handles

        def loaded(built: Any) -> None:
            """Before its first launch."""
            is_new = built.module is None
            load(built)
            if is_new and "ttir" in built.asm:  # a cache that is carried along has the machine code alone
                self.expect(built.function, built.asm["ttir"])

        CompiledKernel._init_handles = loaded

    def expect(self, function: int, ttir: str) -> None:
        """Tell it which arguments a kernel takes for aligned pointers."""
        header = re.search(r"tt\.func public @\w+\((.*)\)", ttir)[1]
        parameters = re.findall(r"%[\w.]+: (\S+)(?: \{tt\.divisibility = (\d+) : i32\})?", header)
        alignments = [int(alignment or 0) if kind.startswith("!tt.ptr") else 0 for kind, alignment in parameters]
        self.library.stand_in_expect(
            ctypes.c_void_p(function), len(alignments), (ctypes.c_int * len(alignments))(*alignments)
        )

    def launches(self) -> Counter[tuple[str, int]]:
        """How often each compiled kernel was launched; its name, and its number in the driver."""
        from tests.tools.offline import kernels

        return Counter({
            (f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}", built.function):
                self.library.stand_in_launches(ctypes.c_void_p(built.function))
            for kernel in kernels()
            for built in kernel.device_caches[0][0].values()
            if built.function is not None
        })  # fmt: skip


def seconds() -> float:
    """Of processor time, of this process and of the compilers it has run: what a busy machine does not change."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def step(driver: Driver, name: str, n: int, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward: what each launched, what was new, and the seconds of the two."""
    loss = CASES[name].make()
    for option, value in options.items():
        setattr(loss, option, value)
    leaves, others = CASES[name].inputs(n, getattr(torch, dtype))
    before, began = driver.launches(), seconds()
    value = loss(*leaves, **others)
    value = value[0] if isinstance(value, tuple) else value
    between = driver.launches()
    torch.autograd.grad(value, [*leaves, *loss.parameters()], torch.ones_like(value))
    after = driver.launches()
    return {
        "forward": dict(Counter(kernel for kernel, _ in (between - before).elements())),
        "backward": dict(Counter(kernel for kernel, _ in (after - between).elements())),
        "new": [kernel for kernel, _ in after.keys() - before.keys()],
        "seconds": seconds() - began,
    }


def refusals(driver: Driver) -> list[str]:
    """What the stand-in says of launches that a GPU refuses, or answers with an error."""
    from hpcloss.backends.triton.probe import _touch

    said, x = [], torch.zeros(8)
    _touch[(1,)](x)
    built = next(iter(_touch.device_caches[0][0].values()))
    for launch in (lambda: _touch[(1, 70_000)](x), lambda: built[(1, 1, 1)](x[1:])):
        try:
            launch()
        except RuntimeError as error:
            said.append(str(error))
    return said


def tried(driver: Driver) -> dict[str, Any]:
    """What `auto` and an explicit request do with a tensor of a GPU on which kernels leave what the memory held."""
    from hpcloss import backends
    from hpcloss.backends.triton import trial

    tensor = types.SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.float16, shape=(2, DIM), numel=lambda: 2 * DIM
    )
    failure, before = trial.failure, driver.launches()
    backends.forget()

    def on_the_cpu(device: torch.device, *call: Any) -> tuple[str, bool]:
        return failure(torch.device("cpu"), *call)

    with contextlib.ExitStack() as stack:
        stack.callback(backends.forget)
        stack.enter_context(mock.patch.object(trial, "disagreement", trial.disagreement.__wrapped__))
        stack.enter_context(mock.patch.object(trial, "failure", on_the_cpu))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        told = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        chosen = [backends.resolve("auto", tensor) for _ in range(3)]
        launched = Counter(kernel for kernel, _ in (driver.launches() - before).elements())
        try:
            backends.resolve("triton", tensor)
            refused = ""
        except NotImplementedError as error:
            refused = str(error)
    return {
        "chosen": chosen, "told": [str(one.message) for one in told], "refused": refused, "launched": dict(launched)
    }  # fmt: skip


def host_time(driver: Driver, name: str, n: int, dtype: str) -> dict[str, Any]:
    """Microseconds of processor time of a step, and of an eager one of 8 rows; its launches; the shares of its stages.

    Medians of turns, the two side by side. A share is that of a step under Python's profiler, which makes small
    functions look larger than they are.
    """
    loss, (leaves, others) = CASES[name].make(), CASES[name].inputs(n, getattr(torch, dtype))
    few, labels = leaf(8, DIM, dtype=torch.float32), choice([0, 1, 2], 8)

    def ours() -> None:
        torch.autograd.grad(loss(*leaves, **others), leaves)

    def eager() -> None:
        torch.autograd.grad(eager_supcon(few, labels), [few])

    turns: dict[Any, list[float]] = {ours: [], eager: []}
    for _ in range(3):
        ours(), eager()
    for _ in range(21):
        for one, taken in turns.items():
            began = time.process_time()
            for _ in range(20):
                one()
            taken.append((time.process_time() - began) / 20 * 1e6)
    before = driver.launches()
    ours()
    launches = sum((driver.launches() - before).values())
    profile = cProfile.Profile()
    profile.runcall(lambda: [ours() for _ in range(50)])
    found = {key[2]: cumulative for key, (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items()}
    whole = found[ours.__name__]
    return {
        "us": statistics.median(turns[ours]),
        "eager_us": statistics.median(turns[eager]),
        "launches": launches,
        "stages": {stage: found[stage] / whole for stage in STAGES if stage in found},
    }


# Functions by whose time a step is told apart; those of the primitives are the forward passes.
STAGES = (
    "partition", "class_sort", "pack", "contrast", "pair_lse", "pair_mean", "pair_cross_entropy", "reduce",
    "_engine_run_backward", "pack_backward", "pair_lse_backward", "pair_mean_backward",
    "pair_cross_entropy_backward",
)  # fmt: skip


ANSWERS = {"step": step, "refusals": refusals, "tried": tried, "host_time": host_time}


def serve(capability: int, rank: int, ranks: int, store: str) -> None:
    """Answer requests, a line each: one of the functions above and its arguments."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=200)
        )
    with device(capability):
        driver = Driver(capability)
        for request in sys.stdin:
            try:
                name, arguments = json.loads(request)
                answer = {"result": ANSWERS[name](driver, **arguments)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------ in the test's process


def build(folder: Path) -> Path:
    """The stand-in for the driver, in a folder that the loader may search."""
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    made = folder / "libcuda.so.1"
    subprocess.run(
        ["cc", *flags, f"-Wl,-soname,{made.name}", "-I", include, HERE / "cuda_driver.c", "-o", made], check=True
    )
    made.with_suffix("").symlink_to(made.name)  # by which older versions of Triton link it
    return made


class Machine:
    """Processes of `serve` on GPUs of one compute capability, in one group where there are several."""

    def __init__(self, capability: int, folder: Path, ranks: int = 1, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        build(folder)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        environment.pop("TRITON_INTERPRET", None)
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(capability), str(rank), str(ranks), str(folder / "store")],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def step(self, name: str, n: int, dtype: str = "float16", **options: Any) -> dict[str, Any]:
        """`step` on every rank; the answer of the first."""
        return self.ask("step", name=name, n=n, dtype=dtype, options=options)

    def ask(self, function: str, **arguments: Any) -> Any:
        """What the first rank answers; AssertionError with what is raised on any."""
        for rank in self.ranks:
            with contextlib.suppress(BrokenPipeError):  # it has ended, as its empty answer tells
                rank.stdin.write(json.dumps([function, arguments]) + "\n")
                rank.stdin.flush()
        lines = [rank.stdout.readline() for rank in self.ranks]
        answers = [json.loads(line) if line else {"error": "the process ended"} for line in lines]
        for answer in answers:
            if "error" in answer:
                said = answer["error"].strip()
                raise AssertionError(f"{function} {arguments}: {said.splitlines()[-1]}\n{said}")
        return answers[0]["result"]

    def stop(self) -> None:
        for rank in self.ranks:
            rank.kill()
            with contextlib.suppress(BrokenPipeError):
                rank.communicate()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:4]), sys.argv[4])
