"""Times and peak memory on a device. Without one that computes, every time is NaN and is never written down."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import DEVICE, DRY, LAUNCHED_ONLY, ON_GPU, wait


def stamp() -> Any:
    """A moment of the device."""
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(first: Any, last: Any) -> float:
    return first.elapsed_time(last) if ON_GPU else 1e3 * (last - first)


def medians(once: Callable[[], list[Any]], seconds: float) -> list[float]:
    """Median milliseconds between the stamps that `once` returns: many repeats within `seconds`, but at least three."""
    if LAUNCHED_ONLY:
        return [math.nan] * (len(once()) - 1)
    repeats = 1
    for _ in range(0 if DRY else 2):  # the second is warm
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
    return timed(captured(function)[0].replay if ON_GPU else function, seconds)


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
    if ON_GPU:
        for leaf in leaves:
            leaf.grad = None
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        wait()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures


def ceilings() -> dict[str, float]:
    """Operations per second of large matmuls of random data, and bytes per second, read and written, of a copy."""
    n, found = (8192 if ON_GPU else 64), {}
    kinds = {
        "float16": (torch.float16, "highest"), "bfloat16": (torch.bfloat16, "highest"),
        "float32": (torch.float32, "highest"), "tf32": (torch.float32, "high"),
    }  # fmt: skip
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        found[name] = 2.0 * n**3 / (timed(partial(torch.mm, a, b), 0.5) * 1e-3)
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(2**32 if ON_GPU else 2**16, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found["copy"] = 2.0 * source.numel() / (timed(partial(target.copy_, source), 0.5) * 1e-3)
    return found
