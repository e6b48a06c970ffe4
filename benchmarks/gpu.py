"""The acceptance run on one GPU: the GPU tests, the machine's ceilings, then every row: correct first, then its time.

    python benchmarks/gpu.py --out DIR [--only NAME ...] [--quick] [--list] [--dry]

Needs torch, triton and pytest, no installation. Writes DIR/gpu.json (after each row), DIR/gpu.txt, DIR/tests.log and,
where compute-sanitizer is installed, DIR/sanitizer.log; ends within `--limit` seconds. Exit status 0: all ran and
was correct; a missed speed bar is marked, no failure.
A row that breaks the CUDA context or hangs is recorded, and the script goes on with the next one in a fresh process.
`--dry` runs tiny sizes on the CPU in Triton's interpreter.

F = 2 D x (pairs of the rule with a real anchor); a step is 3F, a forward pass F, a backward pass 2F.
"""

# ruff: noqa: E402  (the package is found beside this folder)
from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import peers
import torch
from measure import Bar
from torch import Tensor

import hpcloss
from hpcloss import reference
from hpcloss.pack import Rows, pack
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import class_sort, partition
from hpcloss.regions import Grid
from hpcloss.sampling import sample

DRY = os.environ.get("TRITON_INTERPRET") == "1"  # set by --dry, before Triton is imported
DEVICE = torch.device("cpu" if DRY else "cuda")
BACKEND = "triton"
TESTS = ("test_gpu.py", "test_kernels.py", "test_kernels_pack.py", "test_kernels_segments.py")
TEST_PROCESSES = 13  # one for the large tests, twelve for the rest: every twelfth runs the same kernels, built once
ROW_SECONDS = 100  # after these a row is given up
ANCHORS = 256  # checked in float64
LOSS_SCALE = 4096.0  # as a trainer's: gradients of half-precision maps would be denormal
HALF, SINGLE = torch.float16, torch.float32
ERRORS = {"float16": 1e-2, "bfloat16": 1e-2, "tf32": 1e-2, "float32": 1e-4}  # largest relative error, by arithmetic


class Skip(Exception):
    """A row that cannot run here; the message says why."""


def size(full: Any, tiny: Any) -> Any:
    """The size on a GPU, and that of a dry run."""
    return tiny if DRY else full


D = size(128, 16)
MANY = size(65536, 64)

# ------------------------------------------------------------------------------------------------------- inputs


class Case(NamedTuple):
    """A loss on leaves, what it should be in float64, and its work."""

    loss: Callable[..., Tensor]  # loss(*leaves, reduction=..., backend=...)
    leaves: list[Tensor]
    exact: Callable[..., Tensor]  # exact(chosen, *float64 leaves): losses of the chosen anchors
    flops: float  # F
    labels: Tensor

    def step(self) -> Tensor:
        return self.loss(*self.leaves)


def spread(labels: Tensor, dim: int, seed: int = 0) -> Tensor:
    """Rows around the centres of their classes, so that similarities spread as in training."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator, device=DEVICE)
    return torch.randn(labels.numel(), dim, generator=generator, device=DEVICE).add_(centres[labels], alpha=0.5)


def supcon(n: int, dim: int = D, dtype: torch.dtype = HALF, normalize: bool = True, learnable: bool = False) -> Case:
    """Vectors of four classes; un-normalised ones are of length about 1."""
    labels = torch.randperm(n, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) % 4
    rows = (spread(labels, dim) * (1 if normalize else 0.8 * dim**-0.5)).to(dtype).requires_grad_()
    leaves = [rows] + ([torch.tensor(0.1, device=DEVICE, requires_grad=True)] if learnable else [])

    def loss(rows: Tensor, temperature: Any = 0.1, **options: Any) -> Tensor:
        options = {"backend": BACKEND, "normalize": normalize, **options}
        return hpcloss.supcon_loss(rows, labels, temperature=temperature, **options)

    def exact(chosen: Tensor, rows: Tensor, temperature: Any = 0.1) -> Tensor:
        rows = torch.nn.functional.normalize(rows, dim=1) if normalize else rows
        others = chosen[:, None] != torch.arange(n, device=DEVICE)
        lse = reference.pair_lse(rows[chosen], rows, others, 1 / temperature)
        positive = others & (labels[chosen, None] == labels)
        return lse - reference.pair_mean(rows[chosen], rows, positive, 1 / temperature, 0.0, None, "logit")[0]

    return Case(loss, leaves, exact, 2.0 * dim * n**2, labels)


def infonce(n: int) -> Case:
    """Two views of n vectors."""
    labels = torch.arange(n, device=DEVICE) % 4
    leaves = [spread(labels, D, seed).to(HALF).requires_grad_() for seed in (0, 1)]

    def loss(query: Tensor, positive: Tensor, **options: Any) -> Tensor:
        return hpcloss.infonce_loss(query, positive, **{"backend": BACKEND, **options})

    def exact(chosen: Tensor, query: Tensor, positive: Tensor) -> Tensor:
        query, positive = (torch.nn.functional.normalize(x, dim=1) for x in (query[chosen], positive))
        logits = 10.0 * query @ positive.T
        return torch.logsumexp(logits, 1) - logits[torch.arange(len(chosen), device=DEVICE), chosen]

    return Case(loss, leaves, exact, 2.0 * D * n**2, labels)


def label_map(batch: int, height: int, width: int, background: float = 0.0) -> Tensor:
    """Square patches of four equal classes 1..4, and a share of background patches 0, in random places."""
    patch = size(8, 2)
    shape = (batch, height // patch, width // patch)
    place = torch.randperm(math.prod(shape), generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    coarse = torch.where(place < background * len(place), 0, 1 + place % 4).view(shape)
    return coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def region_phpc(
    batch: int, height: int, width: int, region: int | None = None, background: float = 0.0,
    dtype: torch.dtype = HALF, **options: Any,
) -> Case:  # fmt: skip
    """Hard-positive pixel contrast of a channels-first map; `background`: share of pixels that are keys alone."""
    labels = label_map(batch, height, width, background)
    flat = labels.reshape(-1)
    features = spread(flat, D).view(batch, height, width, D).permute(0, 3, 1, 2).contiguous().to(dtype).requires_grad_()
    cell = region or max(height, width)
    grid = Grid(batch, (height, width), (cell, cell))
    regions, count = grid.ids(flat.device), grid.num_regions()
    anchors, keys = (torch.bincount(regions[mask], minlength=count).double() for mask in (flat > 0, flat >= 0))
    options = {"region_size": region, "background": 0 if background else None, "backend": BACKEND, **options}

    def loss(features: Tensor, **changed: Any) -> Tensor:
        return hpcloss.region_phpc_loss(features, labels, **{**options, **changed})

    def exact(chosen: Tensor, features: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(rows_of(features), dim=1)
        inside = (regions[chosen, None] == regions) & (chosen[:, None] != torch.arange(len(flat), device=DEVICE))
        same = flat[chosen, None] == flat
        negative = reference.pair_lse(rows[chosen], rows, inside & ~same, 10.0)
        mean = reference.pair_mean(rows[chosen], rows, inside & same, 10.0, 1.0, negative, "own")[0]
        return torch.where(flat[chosen] > 0, mean, 0.0)

    return Case(loss, [features], exact, 2.0 * D * float((anchors * keys).sum()), labels)


def rows_of(x: Tensor) -> Tensor:
    """[N, D] of vectors or of a map."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


# ---------------------------------------------------------------------------------------- correctness and timing


def distance(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; infinite where anything is not finite."""
    error = float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


def judged(value: float, gradient: float, arithmetic: str) -> dict[str, Any]:
    """The errors as figures of a row; AssertionError where they are too large."""
    most = ERRORS[arithmetic]
    assert value <= most and gradient <= most, f"relative error {value:.2e}, of the gradient {gradient:.2e}, not {most}"
    return {"error_value": value, "error_gradient": gradient, "allowed_error": most}


def errors(case: Case, arithmetic: str) -> dict[str, Any]:
    """Losses of random anchors and their gradients, in all rows, against the dense form in float64."""
    n = case.labels.numel()
    chosen = torch.randperm(n, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)[:ANCHORS]
    losses = case.loss(*case.leaves, reduction="none").reshape(-1)[chosen]
    grads = torch.autograd.grad(losses.sum() * LOSS_SCALE, case.leaves)
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    exact = case.exact(chosen, *leaves)
    gradient = [0.0]
    for found, wanted in zip(grads, torch.autograd.grad(exact.sum() * LOSS_SCALE, leaves)):
        parts: list[Any] = [...]
        if wanted.dim() > 1:  # the anchors, and the rows that are keys alone, whose gradients are far smaller
            found, wanted, anchor = rows_of(found), rows_of(wanted), torch.isin(torch.arange(n, device=DEVICE), chosen)
            parts = [part for part in (anchor, ~anchor) if part.any()]
        gradient += [distance(found[part], wanted[part]) for part in parts]
    return judged(distance(losses, exact), max(gradient), arithmetic)


def wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def stamp() -> Any:
    """A moment of the device."""
    if DRY:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(first: Any, last: Any) -> float:
    return 1e3 * (last - first) if DRY else first.elapsed_time(last)


def medians(once: Callable[[], list[Any]], seconds: float) -> list[float]:
    """Median milliseconds between the stamps that `once` returns: many repeats within `seconds`, but at least three."""
    repeats = 1
    for _ in range(size(2, 0)):  # the second is warm
        wait()
        start = time.perf_counter()
        once()
        wait()
        repeats = min(max(math.ceil(seconds / (time.perf_counter() - start)), 3), 100)
    stamps = [once() for _ in range(repeats)]
    wait()
    parts = range(len(stamps[0]) - 1)
    return [statistics.median(milliseconds(s[part], s[part + 1]) for s in stamps) for part in parts]


def timed(function: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a function."""
    return medians(lambda: [stamp(), (function(), stamp())[1]], seconds)[0]


def replayed(function: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of the replayed CUDA graph of a function: the device's work without the host's."""
    if DRY:
        return timed(function, seconds)
    return timed(captured(function)[0].replay, seconds)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any, float]:
    """The graph of a function, what it returned, and the milliseconds of capturing it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    wait()
    graph, start = torch.cuda.CUDAGraph(), time.perf_counter()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result, 1e3 * (time.perf_counter() - start)


def step_figures(step: Callable[[], Tensor], leaves: list[Tensor], seconds: float) -> dict[str, Any]:
    """Milliseconds of forward and backward, and the peak memory of one step beyond what was there."""

    def once() -> list[Any]:
        for leaf in leaves:
            leaf.grad = None
        start = stamp()
        loss = step()
        middle = stamp()
        loss.backward()
        return [start, middle, stamp()]

    forward, backward = medians(once, seconds)
    figures = {"forward_ms": forward, "backward_ms": backward, "ms": forward + backward, "peak_bytes": None}
    if not DRY:
        for leaf in leaves:
            leaf.grad = None
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        wait()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures


# ----------------------------------------------------------------------------------------------------------- rows


def barred(figures: dict[str, Any], *bars: Bar) -> dict[str, Any]:
    return figures | {"bars": [bar.as_dict() for bar in bars]}


def loss_row(
    run: Run, make: Callable[..., Case], *, share: float | None = None, precision: str = "highest",
    more: Callable[[Run, dict[str, Any]], list[Bar]] | None = None, **parameters: Any,
) -> dict[str, Any]:  # fmt: skip
    """Errors, then times, of a loss; `share`: the bar of its share of the matmul rate; `more`: other bars."""
    torch.set_float32_matmul_precision(precision)
    try:
        case = make(**parameters)
        dtype = str(case.leaves[0].dtype).removeprefix("torch.")
        arithmetic = "tf32" if dtype == "float32" and precision != "highest" else dtype
        figures = {"n": case.labels.numel(), "dim": case.leaves[0].shape[1], "dtype": dtype, "flops": case.flops}
        figures |= errors(case, arithmetic) | step_figures(case.step, case.leaves, run.seconds)
    finally:
        torch.set_float32_matmul_precision("highest")
    bars = []
    if rate := run.document["ceilings"].get(arithmetic):
        figures["share"] = 3e3 * case.flops / figures["ms"] / rate
        bars += [Bar("share of the matmul rate", figures["share"], share, at_least=True)] if share else []
    return barred(figures, *bars, *(more(run, figures) if more else ()))


def less_than_whole(run: Run, figures: dict[str, Any]) -> list[Bar]:
    whole = run.figure("hpc dense", "ms")
    return [Bar("time over that without background", figures["ms"] / whole, 0.45)] if whole else []


def as_good_as_small(run: Run, figures: dict[str, Any]) -> list[Bar]:
    share, peak, elements = run.figure("hpc dense", "share"), figures["peak_bytes"], figures["n"] * figures["dim"]
    bars = [Bar("share over that at 65 536", figures["share"] / share, 0.95, at_least=True)] if share else []
    return bars + ([Bar("peak bytes per feature element", peak / elements, 14)] if peak else [])


def whole_step_row(run: Run, make: Callable[..., Case], **parameters: Any) -> dict[str, Any]:
    """Value and gradient of the mean over all anchors, against the PyTorch tiles in float64."""
    case = make(**parameters)
    found = []
    for backend, cast in ((BACKEND, HALF), ("blockwise", torch.float64)):
        leaf = case.leaves[0].detach().to(cast).requires_grad_()
        loss = case.loss(leaf, backend=backend)
        found.append((loss, torch.autograd.grad(loss * case.labels.numel() * 16, leaf)[0]))
    (loss, grad), (exact, exact_grad) = found
    return judged(distance(loss, exact.double()), distance(grad, exact_grad), "float16")


def peer_row(run: Run, method: str, n: int) -> dict[str, Any]:
    """A competitor on the same rows, in half precision by autocast, next to our row of the same n."""
    chunked = method == "linear_cross_entropy"
    case, half = (infonce if chunked else supcon)(n), partial(torch.autocast, DEVICE.type, HALF)
    arguments, loss = (*case.leaves, case.labels)[:2], peers.eager_supcon
    if chunked:
        if reason := peers.why_not("linear_cross_entropy"):
            raise Skip(reason)
        loss, half = peers.chunked_infonce, contextlib.nullcontext
        if DRY:  # not in half precision on a CPU
            arguments = tuple(leaf.detach().float().requires_grad_() for leaf in case.leaves)
            case = case._replace(leaves=list(arguments))
    elif method == "compiled":
        if DRY:
            raise Skip("a dry run does not compile")
        torch._dynamo.reset()
        with half():
            loss = peers.compiled(loss, *arguments)

    def step() -> Tensor:
        with half():
            return loss(*arguments)

    figures = {"n": n, "dim": D, "dtype": "float16", "error_value": distance(step().double(), case.step().double())}
    assert figures["error_value"] <= 0.05, f"its value is off ours by {figures['error_value']:.2e}"
    figures |= step_figures(step, case.leaves, run.seconds)
    if not (ours := run.figure(f"{'infonce' if chunked else 'supcon'} {n}", "ms")):
        return figures
    figures["times_ours"] = figures["ms"] / ours
    limit = {"eager": 8 if n >= 16384 else None, "compiled": 1 if n >= 2048 else None}.get(method)
    return barred(figures, *([Bar(f"times ours ({method})", figures["times_ours"], limit, True)] if limit else []))


def small_row(
    run: Run, make: Callable[..., Case], eager: Callable[[Case], Tensor], **parameters: Any
) -> dict[str, Any]:
    """A small problem in fp32 beside the dense loss in eager mode."""
    case = make(**parameters, dtype=SINGLE)
    figures = {"n": case.labels.numel(), "dim": D, "dtype": "float32", **errors(case, "float32")}
    assert distance(eager(case).double(), case.step().double()) < 1e-3, "the eager loss has another value"
    figures |= step_figures(case.step, case.leaves, run.seconds)
    figures["eager_ms"] = step_figures(lambda: eager(case), case.leaves, run.seconds)["ms"]
    return barred(figures, Bar("time over eager", figures["ms"] / figures["eager_ms"], 1.2))


def eager_supcon(case: Case) -> Tensor:
    return peers.eager_supcon(case.leaves[0], case.labels)


def eager_phpc(case: Case) -> Tensor:
    return peers.eager_phpc(rows_of(case.leaves[0]), case.labels.reshape(-1))


def block_loop_row(run: Run, batch: int, height: int, width: int, region: int) -> dict[str, Any]:
    """The published loop over blocks, fp32 as its authors ran it, beside this package on the map in half precision."""
    options = {"hardness": 0.0, "discount": 0.1, "reduction": "region"}
    case = region_phpc(batch, height, width, region, 0.2, **options)
    leaf = case.leaves[0].detach().float().requires_grad_()

    def loop() -> Tensor:
        with DEVICE:
            return peers.block_loop(leaf, case.labels, region)

    figures = {"n": case.labels.numel(), "dim": D, "dtype": "float16"}
    figures["error_value"] = distance(case.step(), loop().double())
    assert figures["error_value"] <= 1e-2, f"the loop's value is off ours by {figures['error_value']:.2e}"
    figures |= step_figures(case.step, case.leaves, run.seconds)
    figures |= {f"loop_{key}": value for key, value in step_figures(loop, [leaf], run.seconds).items()}
    single = step_figures(lambda: case.loss(leaf), [leaf], run.seconds)["ms"]
    figures |= {"fp32_ms": single, "fp32_times_faster": figures["loop_ms"] / single}
    return barred(figures, Bar("times faster than the block loop", figures["loop_ms"] / figures["ms"], 15, True))


def primitive_row(run: Run, primitive: str, rule: str) -> dict[str, Any]:
    """One primitive alone on unit rows of four equal classes; the share of its forward and of its backward pass."""
    labels = torch.arange(MANY, device=DEVICE) % 4
    pairs = partition(labels, num_classes=4)
    data = torch.nn.functional.normalize(spread(labels, D), dim=1).to(HALF)[pairs.order.long()]
    rows = Rows(data, torch.zeros(MANY, D, device=DEVICE, requires_grad=True))
    scale, upstream = torch.tensor(10.0, device=DEVICE), torch.full((MANY,), 1 / MANY, device=DEVICE)
    options: dict[str, Any] = {"scale_bound": 10.0, "backend": BACKEND}
    if rule == "own":
        options |= {"hardness": 1.0, "stat": pair_lse(rows.detach(), pairs, "negatives", scale, **options)}

    def forward() -> Tensor:
        return pair_lse(rows, pairs, rule, scale, **options) if primitive == "pair_lse" else (
            pair_mean(rows, pairs, rule, scale, **options)[0])  # fmt: skip

    result = forward()
    assert bool(result.isfinite().all()), "not finite"
    flops = 2.0 * D * MANY**2 * {"negatives": 0.75, "others": 1.0}.get(rule, 0.25)  # the rule's share of all pairs
    backward = partial(torch.autograd.grad, result, rows.companion, upstream, retain_graph=True)
    with torch.no_grad():
        there = timed(forward, run.seconds)
    back = timed(backward, run.seconds)
    figures = {"n": MANY, "dim": D, "dtype": "float16", "flops": flops}
    figures |= {"forward_ms": there, "backward_ms": back, "ms": there + back}
    if rate := run.document["ceilings"].get("float16"):
        work = {"forward_share": flops / there, "backward_share": 2 * flops / back, "share": 3 * flops / (there + back)}
        figures |= {name: 1e3 * speed / rate for name, speed in work.items()}
    return figures


def pack_row(run: Run, channels_last: bool) -> dict[str, Any]:
    """Gather and normalise a map in the order of 16 x 16 regions, and its backward pass, as replayed graphs.

    Bytes: the map once and the rows once; back the rows, their fp32 gradient and the map's gradient once.
    """
    batch, side, region = size((8, 256, 16), (2, 8, 4))
    case = region_phpc(batch, side, side, region)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = case.leaves[0].detach().contiguous(memory_format=layout)
    pairs = partition(case.labels, Grid(batch, (side, side), (region, region)))
    # The operators themselves: a captured backward pass would run on the stream of its forward pass.
    there = partial(torch.ops.hpcloss.pack, features, pairs.order, pairs.live(), True, BACKEND)
    data, inverse_norm = there()
    grad = torch.randn(data.shape, device=DEVICE)
    of_map = (True, list(features.shape), list(features.stride()), features.dtype, True, BACKEND)
    back = partial(torch.ops.hpcloss.pack_backward, grad, data, inverse_norm, pairs.order, *of_map)
    chosen = torch.randperm(len(grad), device=DEVICE)[:ANCHORS]
    pixels = pairs.order[chosen].long()
    leaf = rows_of(features)[pixels].double().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=1)
    (wanted,) = torch.autograd.grad(unit, leaf, grad[chosen].double())
    figures = judged(distance(data[chosen], unit), distance(rows_of(back())[pixels], wanted), "float16")
    bytes_moved, names = [4 * features.numel(), 8 * features.numel()], ("pack", "unpack")
    ms = [replayed(function, run.seconds) for function in (there, back)]
    figures |= {"n": len(grad), "dim": D, "dtype": "float16", "bytes": bytes_moved}
    figures |= {"forward_ms": ms[0], "backward_ms": ms[1], "ms": sum(ms)}
    copy = run.document["ceilings"].get("copy") or math.inf
    shares = [1e3 * moved / took / copy for moved, took in zip(bytes_moved, ms)]
    return barred(figures, *(Bar(f"{name}: share of the copy rate", x, 0.7, True) for name, x in zip(names, shares)))


def plan_rows(run: Run, num_classes: int | None) -> dict[str, Any]:
    """Partition of 12 x 512 x 512 labels into regions of 16 x 16."""
    batch, side, region = size((12, 512, 16), (2, 8, 4))
    labels = label_map(batch, side, side, 0.2)
    grid = Grid(batch, (side, side), (region, region))
    plan = partial(partition, labels, grid, background=0, num_classes=num_classes)
    pairs = plan()
    key = (grid.ids(labels.device) * 5 + labels.reshape(-1))[pairs.order.long()]
    assert bool((key[1:] >= key[:-1]).all()), "the order is not sorted"
    return {"n": labels.numel(), "ms": timed(plan, run.seconds)}


def sample_rows(run: Run, kind: str, limit: float) -> dict[str, Any]:
    """Partition and sample of 12 x 512 x 512 labels: 256 pixels of each image and class; against the published loop."""
    batch, side, k = size((12, 512, 256), (2, 8, 5))
    labels = label_map(batch, side, side, 0.2)
    maps = {"uniform": {}, "weighted": {"weights": torch.rand(labels.shape, device=DEVICE)}}[kind]
    grid = Grid(batch, (side, side), (side, side), per_image=True)
    seed = torch.tensor(7, device=DEVICE)

    def draw() -> Any:
        rows = class_sort(labels, grid, num_classes=5)
        return sample(rows.order, rows.offsets, k, seed=seed, num_pixels=labels.numel(), **maps)

    drawn, wrong = draw(), torch.rand(labels.shape, device=DEVICE) < 0.3
    taken = drawn.order[: int(drawn.offsets[-1])].long()
    assert taken.unique().numel() == taken.numel(), "a pixel was drawn twice"
    cpu = {name: values.cpu() for name, values in maps.items()}
    rows = class_sort(labels.cpu(), grid, num_classes=5)
    on_cpu = sample(rows.order, rows.offsets, k, seed=7, num_pixels=labels.numel(), **cpu)
    assert torch.equal(drawn.order.cpu(), on_cpu.order), "the sample is not the one drawn on the CPU"
    figures = {"n": labels.numel(), "ms": replayed(draw, run.seconds)}
    loop = timed(partial(peers.hard_anchors, labels, wrong, 5, k), run.seconds)
    figures |= {"eager_ms": timed(draw, run.seconds), "published_loop_ms": loop}
    ratio = Bar("faster than the published loop", loop / figures["ms"], 50, True)
    return barred(figures, Bar("ms", figures["ms"], limit), ratio)


def launches_row(run: Run, what: str, num_classes: int | None, limit: int) -> dict[str, Any]:
    """Launches of a whole region step, or of its plan and pack alone."""
    batch, side, region = size((8, 64, 16), (2, 8, 4))
    case = region_phpc(batch, side, side, region, 0.2, num_classes=num_classes)
    features, labels = case.leaves[0], case.labels

    def plan() -> Any:
        grid = Grid(batch, (side, side), (region, region))
        pairs = partition(labels, grid, background=0, ignore_index=(-100, -1, 255), num_classes=num_classes)
        return pack(features, pairs.order, pairs.live(), normalize=True, backend=BACKEND)

    function = plan if what == "plan" else lambda: torch.autograd.grad(case.step(), case.leaves)
    function()
    if DRY:
        raise Skip("no device to profile")
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        wait()
    names = Counter(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    assert names, "the profiler saw nothing on the device"
    figures = {"launches": names.total(), "names": dict(names.most_common())}
    return barred(figures, Bar("launches", names.total(), limit))


def graph_row(run: Run) -> dict[str, Any]:
    """A captured step of the region loss, replayed on new data, gives what an eager step gives."""
    batch, side, region = size((1, 256, 16), (1, 8, 4))
    case = region_phpc(batch, side, side, region, 0.2)
    features = case.leaves[0]
    if DRY:
        raise Skip("no CUDA graphs on the CPU")

    def step() -> Tensor:
        loss = case.step()
        (features.grad,) = torch.autograd.grad(loss * LOSS_SCALE, features)
        return loss

    graph, loss, capture_ms = captured(step)
    grad = features.grad
    with torch.no_grad():
        features.copy_(features.flip(0, 2))
    graph.replay()
    found = loss.clone(), grad.clone()
    exact = step(), features.grad
    figures = judged(*(distance(a, b.double()) for a, b in zip(found, exact)), "float32")
    figures |= {"n": case.labels.numel(), "dim": D, "capture_ms": capture_ms, "ms": timed(graph.replay, run.seconds)}
    figures["eager_ms"] = timed(step, run.seconds)
    return figures


def no_sync_row(run: Run) -> dict[str, Any]:
    """A step that never waits for the device, on both backends."""
    if DRY:
        raise Skip("no device to wait for")
    for n, backend in ((64, BACKEND), (MANY, BACKEND), (64, "blockwise"), (4096, "blockwise")):
        for case in (supcon(n), region_phpc(1, n // 8, 8, 8, 0.2)):
            case.loss(*case.leaves, backend=backend).backward()
            wait()
            torch.cuda.set_sync_debug_mode("error")
            try:
                case.loss(*case.leaves, backend=backend).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {}


def sanitizer_row(run: Run) -> dict[str, Any]:
    """compute-sanitizer over small problems of every kernel: no access out of bounds, nothing read unwritten."""
    tool = shutil.which("compute-sanitizer")
    if DRY or tool is None:
        raise Skip("no device to watch" if DRY else "compute-sanitizer is not installed")
    chosen = (
        "(test_sizes and 33) or (test_edges and runs) or test_pair_lse_both or test_prototypes"
        " or (test_native_is_the_same and not 4096) or test_native_reads"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x", "-q",
               "-p", "no:cacheprovider", "-k", chosen, "tests/test_kernels.py",
               "tests/test_kernels_segments.py", "tests/test_gpu.py"]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=ROW_SECONDS - 10)
    (run.out / "sanitizer.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    return {"said": done.stdout.strip().splitlines()[-1]}


def kernels_row(run: Run) -> dict[str, Any]:
    """Registers, spills and shared memory of every kernel that this process launched."""
    found = {}
    for name, module in list(sys.modules.items()):
        for kernel in list(vars(module).values()) if name.startswith("hpcloss.backends.triton") else ():
            for caches in list(getattr(kernel, "device_caches", {}).values()):
                for built in caches[0].values():
                    places = {at[0] if isinstance(at, tuple) else at: x for at, x in built.src.constants.items()}
                    constants = {kernel.arg_names[at]: str(x) for at, x in places.items()}
                    found[id(built)] = {
                        "kernel": f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
                        "num_warps": built.metadata.num_warps, "shared_bytes": built.metadata.shared,
                        "registers": getattr(built, "n_regs", None), "spills": getattr(built, "n_spills", None),
                        **{key: x for key, x in constants.items() if key.isupper()},
                    }  # fmt: skip
    if not found:
        raise Skip("no compiled kernel is reachable")
    spilling = [kernel for kernel in found.values() if kernel["spills"]]
    return {"kernels": list(found.values()), "message": f"{len(found)} kernels built, {len(spilling)} spill registers"}


def rows(run: Run | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every row by name, the most important first: what does not fit into the time is left out at the end."""
    ladder = size((1024, 2048, 4096, 8192, 16384, 32768), (64,))
    maps = size((8, 256, 256, 16), (2, 4, 8, 4))
    dense = dict(zip(("batch", "height", "width"), size((1, 256, 256), (1, 8, 8))))
    loss = partial(partial, loss_row, run)
    return {
        f"supcon {MANY}": loss(supcon, n=MANY, share=0.55),
        "hpc dense": loss(region_phpc, **dense, share=0.45),
        "hpc dense, 80 % background": loss(region_phpc, **dense, background=0.8, more=less_than_whole),
        "region phpc": loss(region_phpc, **dict(zip(("batch", "height", "width", "region"), maps)), background=0.2,
                            share=0.35),
        "hpc dense, whole map": loss(region_phpc, **dict(dense, **size({"height": 512, "width": 512}, {"width": 12})),
                                     more=as_good_as_small),
        "pack, channels first": partial(pack_row, run, False),
        "pack, channels last": partial(pack_row, run, True),
        **{f"small supcon {n}": partial(small_row, run, supcon, eager_supcon, n=n)
           for n in size((256, 512, 1024), (64,))},
        **{f"small region map {s}x{s}": partial(small_row, run, region_phpc, eager_phpc, batch=1, height=s, width=s)
           for s in size((16, 32), (8,))},
        "pair_lse negatives": partial(primitive_row, run, "pair_lse", "negatives"),
        "pair_lse others": partial(primitive_row, run, "pair_lse", "others"),
        "pair_mean own": partial(primitive_row, run, "pair_mean", "own"),
        "pair_mean logit": partial(primitive_row, run, "pair_mean", "logit"),
        "launches, step": partial(launches_row, run, "step", None, 25),
        "launches, step with num_classes": partial(launches_row, run, "step", 5, 25),
        "launches, plan and pack": partial(launches_row, run, "plan", None, 8),
        "launches, plan and pack with num_classes": partial(launches_row, run, "plan", 5, 8),
        "graph of a step": partial(graph_row, run),
        "no host sync": partial(no_sync_row, run),
        "whole step, supcon": partial(whole_step_row, run, supcon, n=MANY),
        "whole step, hpc": partial(whole_step_row, run, region_phpc, **dense),
        **{f"supcon {n}": loss(supcon, n=n) for n in (*ladder, *size((262144,), ())) if n != MANY},
        **{f"infonce {n}": loss(infonce, n=n) for n in (*ladder, *size((65536,), ()))},
        "supcon, D = 64": loss(supcon, n=MANY, dim=D // 2),
        "supcon, D = 256": loss(supcon, n=MANY, dim=D * 2),
        "supcon, bf16 un-normalised": loss(supcon, n=MANY, dtype=torch.bfloat16, normalize=False),
        "supcon, learnable temperature": loss(supcon, n=MANY, learnable=True),
        "supcon, fp32 highest": loss(supcon, n=MANY, dtype=SINGLE),
        "supcon, fp32 high": loss(supcon, n=MANY, dtype=SINGLE, precision="high"),
        "hpc dense, bf16": loss(region_phpc, **dense, dtype=torch.bfloat16),
        "block loop": partial(block_loop_row, run, *maps),
        **{f"eager supcon {n}": partial(peer_row, run, "eager", n) for n in (*ladder, *size((65536,), ()))},
        **{f"linear_cross_entropy {n}": partial(peer_row, run, "linear_cross_entropy", n) for n in ladder},
        "partition": partial(plan_rows, run, None),
        "partition, num_classes": partial(plan_rows, run, 5),
        "partition and sample, uniform": partial(sample_rows, run, "uniform", 0.15),
        "partition and sample, weighted": partial(sample_rows, run, "weighted", 0.4),
        **{f"compiled supcon {n}": partial(peer_row, run, "compiled", n) for n in ladder},
        "kernels": partial(kernels_row, run),
        "sanitizer": partial(sanitizer_row, run),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- sections


def ceilings() -> dict[str, float]:
    """Operations per second of large matmuls of random data, and bytes per second, read and written, of a copy."""
    n, found = size(8192, 64), {}
    kinds = {"float16": (HALF, "highest"), "bfloat16": (torch.bfloat16, "highest"), "float32": (SINGLE, "highest"),
             "tf32": (SINGLE, "high")}  # fmt: skip
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        found[name] = 2.0 * n**3 / (timed(partial(torch.mm, a, b), 0.5) * 1e-3)
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(size(2**32, 2**16), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found["copy"] = 2.0 * source.numel() / (timed(partial(target.copy_, source), 0.5) * 1e-3)
    return found


def output_of(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT).stdout.strip()
    return None


def machine() -> dict[str, Any]:
    """Device, driver, versions and commit."""
    commit, changes = output_of("git", "rev-parse", "HEAD"), output_of("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if not DRY else f"CPU {platform.machine()}, Triton's interpreter",
        "capability": list(torch.cuda.get_device_capability()) if not DRY else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if not DRY else None,
        "driver": None if DRY else output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cores": os.cpu_count(),
        "commit": commit and commit + (" and changes" if changes else ""),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                     "triton": sys.modules["triton"].__version__, "hpcloss": hpcloss.__version__},
    }  # fmt: skip


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """As a pytest plugin (`-p gpu`): keep this process's share of the tests; the large ones run one after another."""
    part, parts = map(int, os.environ["HPCLOSS_SHARE"].split("/"))
    wanted = [item for item in items if item.path.name != "test_gpu.py" or item.get_closest_marker("gpu")]
    large = [item for item in wanted if "beyond_two_to" in item.name]
    small = [item for item in wanted if item not in large]
    items[:] = (large if part == 0 else []) + (small[part - 1 :: parts - 1] if part else small if parts == 1 else [])


def run_tests(log: Path, limit: float) -> dict[str, Any]:
    """`pytest -m gpu tests/test_gpu.py` and the kernels' tests, shared out over processes, within a time limit."""
    names = size(TESTS, ("test_numerics.py",))
    files = [f"tests/{name}" for name in names if (ROOT / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider",
               "-p", "gpu", "-W", "ignore:Failed to initialize NumPy", *files]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the tests ask for deterministic algorithms
        "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    parts = size(min(TEST_PROCESSES, os.cpu_count() or 1), 1)
    start, found = time.perf_counter(), Counter()
    failed, unfinished, codes = [], [], []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(parts)]
        processes = [
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                             env=environment | {"HPCLOSS_SHARE": f"{part}/{parts}"})
            for part, output in enumerate(outputs)
        ]  # fmt: skip
        for process in processes:
            try:
                process.wait(max(start + limit - time.perf_counter(), 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            codes.append(process.returncode)
        with log.open("w") as whole:
            for code, output in zip(codes, outputs):
                output.seek(0)
                text = output.read()
                whole.write(text + f"\nexit status {code}\n\n")
                results = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, re.M)
                found.update(result.lower() for _, result in results)
                failed += [name for name, result in results if result in ("FAILED", "ERROR")]
                if code not in (0, 1, 5):
                    unfinished.append(text.rstrip().splitlines()[-1][:300] if text.strip() else "no output")
    return {
        "command": " ".join(["pytest", *files]), "processes": parts, "seconds": time.perf_counter() - start,
        "passed": found["passed"], "failed": found["failed"] + found["error"], "skipped": found["skipped"],
        "failures": failed, "unfinished": unfinished, "log": log.name,
        "missing": [name for name in names if f"tests/{name}" not in files],
        "ok": found["passed"] > 0 and not failed and all(code in (0, 5) for code in codes),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ run


class Run:
    """What was measured so far, and where it is written."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.out = arguments, arguments.out
        self.seconds = 0.25 if arguments.quick else 0.5
        self.lock = threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)
        self.document: dict[str, Any] = {
            "schema": 1, "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "dry": DRY,
            "date": time.strftime("%Y-%m-%d"), "started": time.time(), "ceilings": {}, "rows": [],
        }  # fmt: skip
        if arguments.resume:
            self.document = json.loads((self.out / "gpu.json").read_text())

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.document['started']:6.1f} s] {text}", flush=True)

    def figure(self, name: str, key: str) -> Any:
        """A figure of an earlier row, or None."""
        return next((row.get(key) for row in self.document["rows"] if row["name"] == name), None)

    def left(self) -> float:
        return self.document["started"] + self.arguments.limit - time.time()

    def write(self) -> None:
        self.document["seconds"] = round(time.time() - self.document["started"], 1)
        (self.out / "gpu.json").write_text(json.dumps(self.document, indent=1) + "\n")
        (self.out / "gpu.txt").write_text(table(self.document) + "\n")

    def section(self, name: str, make: Callable[[], Any]) -> None:
        """Put what `make` returns into the document, unless an earlier process did."""
        if name in self.document and self.document[name]:
            return
        self.say(name)
        try:
            self.document[name] = make()
        except Exception as error:  # whatever it is: the document says so, and the rows can still be measured
            self.document[name], self.document[f"{name}_error"] = {}, f"{type(error).__name__}: {error}"
        self.say(json.dumps(self.document.get(f"{name}_error") or self.document[name]))
        self.write()

    def add(self, name: str, status: str, figures: dict[str, Any]) -> None:
        with self.lock:
            self.document["rows"].append({"name": name, "status": status, **figures})
            self.write()
        self.say(line(self.document["rows"][-1]))

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if self.left() < 5:
            return self.add(name, "left out", {"message": f"the time limit of {self.arguments.limit} s is reached"})
        watchdog = threading.Timer(min(ROW_SECONDS, self.left()), self.give_up, [name])
        watchdog.daemon = True
        watchdog.start()
        broken = False
        try:
            status, figures = "ok", measure()
        except Skip as reason:
            status, figures = "skipped", {"message": str(reason)}
        except torch.cuda.OutOfMemoryError as error:
            status, figures = "out of memory", {"message": str(error).splitlines()[0][:300]}
        except Exception as error:  # whatever it is: one row's failure must not take the others along
            status, figures = "error", {"message": f"{type(error).__name__}: {error}"[:1000]}
            figures["traceback"] = traceback.format_exc()[-3000:]
            broken = any(sign in str(error) for sign in ("CUDA error", "Triton Error [CUDA]"))  # the context is lost
        watchdog.cancel()
        self.add(name, status, figures)
        if broken:
            self.restart()
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()

    def give_up(self, name: str) -> None:
        self.add(name, "error", {"message": "no result within the time limit of a row"})
        self.restart()

    def restart(self) -> None:
        """Go on with the next row in a fresh process in place of this one."""
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments, "--resume"])

    def correct(self) -> bool:
        """Whether everything ran and was right. A competitor out of memory, or that is not there, is a result."""
        may_fail = {"skipped": "", "out of memory": ("eager", "compiled", "linear", "block loop")}
        rows_ok = all(
            row["status"] == "ok" or row["name"].startswith(may_fail.get(row["status"], ()))
            for row in self.document["rows"]
        )
        broken = any(name.endswith("_error") for name in self.document)
        return rows_ok and not broken and self.document.get("tests", {"ok": True}).get("ok", False)


def number(value: Any, form: str = ".3g", factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, form)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    forms = {"forward_ms": ".4g", "backward_ms": ".4g", "ms": ".4g", "share": ".3f", "peak_bytes": ".1f",
             "error_value": ".1e", "error_gradient": ".1e"}  # fmt: skip
    numbers = [number(row.get(key), form, 1e-6 if key == "peak_bytes" else 1.0) for key, form in forms.items()]
    text = f"{row['name']:<41}" + "".join(f"{x:>10}" for x in numbers)
    for bar in row.get("bars", ()):
        text += f"  {'met' if bar['met'] else 'MISSED'} {bar['ratio']:g} ({bar['bar']})"
    if "times_ours" in row and not row.get("bars"):
        text += f"  {row['times_ours']:.2f} times ours"
    if "message" in row:
        text = f"{text.rstrip()}  {row['status']}: {row['message'].splitlines()[0][:160]}"
    return text.rstrip()


def table(document: dict[str, Any]) -> str:
    """Everything for people: the machine, tests, ceilings, rows, and time and memory against N."""
    lines = [f"{key}: {json.dumps(document[key])}" for key in ("machine", "ceilings") if document.get(key)]
    if tests := document.get("tests"):
        counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped"))
        lines += [f"tests: {counts}, {len(tests['unfinished'])} processes did not finish, {tests['seconds']:.0f} s"]
        lines += [f"  {name}"[:160] for name in (*tests["failures"][:15], *tests["unfinished"])]
    heads = ("forward", "backward", "both ms", "share", "peak MB", "err loss", "err grad")
    lines += ["", f"{'':<41}" + "".join(f"{head:>10}" for head in heads), *(line(row) for row in document["rows"])]
    methods = ("supcon", "eager supcon", "compiled supcon", "infonce", "linear_cross_entropy")
    cells = {}
    for row in document["rows"]:
        method, _, n = row["name"].rpartition(" ")
        if method in methods and n.isdigit():
            known = f"{number(row.get('ms'))} ({number(row.get('peak_bytes'), '.0f', 1e-6)})"
            cells[method, int(n)] = known if row["status"] == "ok" else row["status"]
    lines += ["", "milliseconds of a step, half precision (peak MB)"]
    sizes = sorted({n for _, n in cells})
    lines.append(f"{'N':>7}" + "".join(f"{method:>22}" for method in methods))
    lines += [f"{n:>7}" + "".join(f"{cells.get((method, n), ''):>22}" for method in methods) for n in sizes]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--only", action="append", help="rows whose name holds this; no tests unless it is 'tests'")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--quick", action="store_true", help="half as many repeats")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--limit", type=float, default=460, help="seconds after which no row begins")
    parser.add_argument("--test-limit", type=float, default=170, help="seconds for the tests, of the limit's")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry and not DRY:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    wanted = arguments.only or [""]
    if arguments.list:
        print("\n".join(["tests", *rows(None)]))
        return 0
    if DRY != arguments.dry or not (DRY or torch.cuda.is_available()):
        print("no CUDA device, or TRITON_INTERPRET is set: --dry runs on the CPU")
        return 1
    warnings.filterwarnings("ignore", "Failed to initialize NumPy|divide by zero")
    run = Run(arguments)
    import triton  # noqa: F401, PLC0415  its version is reported

    run.section("machine", machine)
    if any(name in "tests" for name in wanted):
        run.section("tests", lambda: run_tests(run.out / "tests.log", arguments.test_limit))
    run.section("ceilings", ceilings)
    done = {row["name"] for row in run.document["rows"]}
    for name, measure in rows(run).items():
        if name not in done and any(part in name for part in wanted):
            run.row(name, measure)
    run.write()
    run.say("done")
    print(table(run.document), flush=True)
    return 0 if run.correct() else 1


if __name__ == "__main__":
    sys.exit(main())
