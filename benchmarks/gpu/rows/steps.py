"""What a step asks of the device and of the host: launches, graphs, waits, and the kernels that were built."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import MANY, D, region_phpc, supcon
from benchmarks.gpu.check import LOSS_SCALE, distance, judged
from benchmarks.gpu.known import Known, barred
from benchmarks.gpu.machine import BACKEND, ON_GPU, Skip, size, wait
from benchmarks.gpu.timing import captured, timed
from benchmarks.measure import Bar
from hpcloss.plan.partition import partition
from hpcloss.plan.regions import Grid
from hpcloss.primitives.rows import pack


def launches_row(run: Known, what: str, num_classes: int | None, limit: int) -> dict[str, Any]:
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
    if not ON_GPU:
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


def graph_row(run: Known) -> dict[str, Any]:
    """A captured step of the region loss, replayed on new data, gives what an eager step gives."""
    batch, side, region = size((1, 256, 16), (1, 8, 4))
    case = region_phpc(batch, side, side, region, 0.2)
    features = case.leaves[0]

    def step() -> Tensor:
        loss = case.step()
        (features.grad,) = torch.autograd.grad(loss * LOSS_SCALE, features)
        return loss

    if not ON_GPU:
        step()
        raise Skip("no CUDA graphs on the CPU")
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


def no_sync_row(run: Known) -> dict[str, Any]:
    """A step that never waits for the device, on both backends."""
    for n, backend in ((64, BACKEND), (MANY, BACKEND), *((n, "blockwise") for n in (64, 4096) if ON_GPU)):
        for case in (supcon(n), region_phpc(1, n // 8, 8, 8, 0.2)):
            case.loss(*case.leaves, backend=backend).backward()
            if not ON_GPU:
                continue
            wait()
            torch.cuda.set_sync_debug_mode("error")
            try:
                case.loss(*case.leaves, backend=backend).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    if not ON_GPU:
        raise Skip("no device to wait for")
    return {}


def kernels_row(run: Known) -> dict[str, Any]:
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
