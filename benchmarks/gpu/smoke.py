"""The first stage: one step of five losses on each backend against the dense form in float64, after the native library.

A failure here ends the run: what fails in the smallest step fails everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hpcloss
from benchmarks.gpu import cache, machine
from benchmarks.gpu.check import distance
from benchmarks.gpu.machine import BACKEND, DEVICE, size
from hpcloss import reference
from hpcloss.plan import native
from hpcloss.plan.partition import class_sort
from hpcloss.plan.regions import Grid
from hpcloss.plan.sampling import sample

if TYPE_CHECKING:
    from benchmarks.gpu.worker import Worker

N, DIM = size(1024, 40), size(128, 16)
NATIVE = "native library"
# Largest relative error of value and gradient: the kernels take fp16 rows, the PyTorch tiles fp32 ones.
BACKENDS = {BACKEND: (torch.float16, 1e-2), "blockwise": (torch.float32, 1e-4)}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int) -> Tensor:
    """Classes 1 to 3, background 0, and ignored pixels."""
    values = torch.tensor([0, 1, 2, 3, 1, 2, 255])
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(9))]


def losses() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Tensor]]]:
    """The loss, its dense form, what is differentiated, and the other arguments."""
    side = size(32, 6)
    vectors, maps = [drawn(N, DIM, seed=seed) for seed in (1, 2)], [drawn(2, DIM, side, side, seed=3)]
    banks = [drawn(4 * N // 16, DIM, seed=4)]
    of_region = {"region_size": size(16, 4)}
    return {
        "region_phpc": (
            partial(hpcloss.region_phpc_loss, **of_region), partial(reference.region_phpc_loss, **of_region),
            maps, [classes(2, side, side)],
        ),
        "supcon": (hpcloss.supcon_loss, reference.supcon_loss, vectors[:1], [torch.arange(N) % 5]),
        "infonce": (hpcloss.infonce_loss, reference.infonce_loss, vectors, []),
        "hard_negative_nce": (hpcloss.hard_negative_nce_loss, reference.hard_negative_nce_loss, vectors, []),
        "prototype_contrast": (
            hpcloss.prototype_contrast_loss, reference.prototype_contrast_loss,
            banks, [torch.arange(len(banks[0])) % 4],
        ),
    }  # fmt: skip


def step(name: str, backend: str) -> dict[str, Any]:
    """Errors of one step; AssertionError where they are too large."""
    loss, dense, leaves, others = losses()[name]
    dtype, allowed = BACKENDS[backend]
    rounded = [leaf.to(dtype) for leaf in leaves]
    own = [leaf.to(DEVICE).requires_grad_() for leaf in rounded]
    value = loss(*own, *[x.to(DEVICE) for x in others], backend=backend)
    gradients = torch.autograd.grad(value * 1024, own)
    machine.wait()
    if machine.LAUNCHED_ONLY and backend == BACKEND:
        return {}
    exact = [leaf.double().requires_grad_() for leaf in rounded]
    right = dense(*exact, *others)
    wanted = torch.autograd.grad(right * 1024, exact)
    errors = [distance(found.cpu(), x) for found, x in zip((value, *gradients), (right, *wanted), strict=True)]
    if not max(errors) <= allowed:
        raise AssertionError(f"relative errors {errors} of the value and the gradients, at most {allowed} expected")
    return {"errors": errors, "allowed_error": allowed}


def native_library(built: dict[str, Any]) -> dict[str, Any]:
    """Partition and sample on the device, by the library that was built, are the integers of the CPU."""
    if built["status"] == "missing":
        raise machine.Skip(built["message"])
    if built["status"] == "failed":
        raise AssertionError(built["message"])
    if reason := native.why_not(DEVICE.type):
        raise AssertionError(f"the native library was built and does not serve: {reason}")
    labels, found = classes(3, 40, 50), []
    for device in (DEVICE, torch.device("cpu")):
        grid, seed = Grid(3, (40, 50), (40, 50), per_image=True), torch.tensor(7, device=device)
        rows = class_sort(labels.to(device), grid, num_classes=5)
        drawn = sample(rows.order, rows.offsets, 9, seed=seed, num_pixels=labels.numel())
        found.append([rows.order, rows.offsets, rows.outside, *drawn])
    if not all(torch.equal(there.cpu(), here) for there, here in zip(*found, strict=True)):
        raise AssertionError("partition and sample on the device are not those of the CPU")
    return {key: built[key] for key in ("command", "library", "build_seconds")}


def run(worker: Worker, built: dict[str, Any]) -> None:
    """Each step, until one fails: its row has the traceback. built: what came of building the native library."""
    if "library" in built:
        os.environ["HPCLOSS_LIBRARY"] = built["library"]
    began = time.perf_counter()
    checks = {NATIVE: partial(native_library, built)}
    checks |= {f"{name}, {backend}": partial(step, name, backend) for name in losses() for backend in BACKENDS}
    for name, check in checks.items():
        worker.say(begin=name)
        row = worker.row(name, lambda known, check=check: check(), None)
        worker.say(row=row | {"seconds": round(time.perf_counter() - began, 2)})
        if row["status"] not in ("ok", "launched", "skipped"):
            return
    worker.say(done=cache.counted())
