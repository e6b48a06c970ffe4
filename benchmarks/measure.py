"""Timing against a yardstick of plain matmuls in the same round, bars, and the rows that are reported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import hpcloss

ROUNDS = 5
YARDSTICK_SECONDS = 0.15  # long enough to average over the scheduler's slices
MAX_GIGABYTES = 5.0  # of further address space; a step that wants more is out of memory


class Bar(NamedTuple):
    """A number to reach: reported, never a failure of its own, for a busy machine misses any."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, object]:
        sense = "at least" if self.at_least else "at most"
        return {"bar": f"{self.name} {sense} {self.limit:g}", "ratio": round(self.value, 3), "met": self.met}


class Rows:
    """What this session measured, one dictionary for each benchmark or for each competitor that could not run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.load = _load()  # before this session adds to it

    def add(self, name: str, parameters: dict[str, object], figures: dict[str, object], bars: list[Bar]) -> None:
        row = {"name": name, "parameters": parameters, **figures}
        if bars:
            row["bars"] = [bar.as_dict() for bar in bars]
        self.rows.append(row)

    def document(self) -> dict[str, object]:
        """The schema of `benchmarks/results/*.json`."""
        return {
            "schema": 1,
            "device": {"cpu": _cpu_name(), "cores": os.cpu_count(), "load_at_start": self.load},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "hpcloss": hpcloss.__version__,
                **_peer_versions(),
            },
            "command": shlex.join(["pytest", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "rows": self.rows,
        }

    def write(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.document(), indent=1) + "\n")

    def table(self) -> Iterator[str]:
        """Every figure that has a bar."""
        for row in self.rows:
            for bar in row.get("bars", ()):
                yield f"{'met   ' if bar['met'] else 'MISSED'} {bar['ratio']:>9.3f}  {bar['bar']:<58} {row['name']}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _peer_versions() -> dict[str, str]:
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    peers = ("pytorch-metric-learning", "lightly", "monai", "info-nce-pytorch")
    return {peer: installed[peer] for peer in peers if peer in installed}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy() -> float | None:
    """The load, where other programs leave no second core free: two threads then wait for each other."""
    load = _load()
    return load if load is not None and load > (os.cpu_count() or 1) - 0.5 else None


def clock() -> float:
    """Seconds of this process's own work while it runs on one thread, so that other programs do not count; else of
    the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- yardsticks


class Matmuls:
    """Operations per second of fp32 matmuls in tiles that stay in cache: S = A B^T and A += S B, in equal parts.

    This is the best rate that a streaming loss could reach; one matmul of whole matrices is slower (it writes S).
    """

    def __init__(self, dim: int = 128, tile: int = 512):
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(tile, dim, generator=generator) for _ in range(2))
        self.s, self.sum = torch.empty(tile, tile), torch.zeros(tile, dim)
        self.work = 4.0 * dim * tile * tile
        self.repeats = 1
        while self._seconds() < YARDSTICK_SECONDS:
            self.repeats *= 2

    def _seconds(self) -> float:
        start = clock()
        for _ in range(self.repeats):
            torch.mm(self.a, self.b.T, out=self.s)
            self.sum.addmm_(self.s, self.b, beta=0)
        return clock() - start

    def __call__(self) -> float:
        return self.work * self.repeats / self._seconds()


class LargeMatmul(Matmuls):
    """Operations per second of one matmul large enough for several threads: 2048 x 512 x 2048."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(2048, 512, generator=generator) for _ in range(2))
        self.s = torch.empty(2048, 2048)
        self.work = 2.0 * 512 * 2048**2
        self.repeats = 1
        while self._seconds() < YARDSTICK_SECONDS:
            self.repeats *= 2

    def _seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            torch.mm(self.a, self.b.T, out=self.s)
        return time.perf_counter() - start


class Copies:
    """Bytes per second that a copy of 64 MB moves, read and write counted."""

    def __init__(self) -> None:
        self.source = torch.ones(2**24)
        self.target = torch.empty_like(self.source)
        self.target.copy_(self.source)

    def __call__(self) -> float:
        start = clock()
        for _ in range(4):
            self.target.copy_(self.source)
        return 4 * 2 * 4 * self.source.numel() / (clock() - start)


def against(
    benchmark, step: Callable[[], object], yardstick: Callable[[], float], work: float, rounds: int = ROUNDS
) -> tuple[float, float]:
    """Time `step` in rounds, each between two readings of the yardstick.

    Returns the median time and the median, over rounds, of the time over that which `work` takes at the yardstick's
    rate then. Pairs of readings close in time see the same machine, however busy.
    """
    step()
    rates: list[float] = []
    seconds: list[float] = []

    def timed() -> None:
        start = clock()
        step()
        seconds.append(clock() - start)

    benchmark.pedantic(timed, setup=lambda: rates.append(yardstick()), rounds=rounds, iterations=1)
    rates.append(yardstick())
    ratios = [
        time_ * (before + after) / 2 / work
        for time_, before, after in zip(seconds, rates[:-1], rates[1:], strict=True)
    ]  # fmt: skip
    return statistics.median(seconds), statistics.median(ratios)


def interleaved(
    benchmark, first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Time `first` in rounds, each next to one of `second`; returns (median first, median of second / first)."""
    seconds, ratios = in_turns(benchmark, first, {"second": second}, rounds)
    return seconds, ratios["second"]


def in_turns(
    benchmark, first: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int
) -> tuple[float, dict[str, float]]:
    """Time `first` in rounds, each behind one of every other; returns (median first, medians of other / first)."""
    seconds: dict[str | None, list[float]] = {name: [] for name in (None, *others)}

    def timed(name: str | None) -> None:
        start = clock()
        (first if name is None else others[name])()
        seconds[name].append(clock() - start)

    def setup() -> None:
        for name in others:
            timed(name)

    first()
    setup()
    for taken in seconds.values():
        taken.clear()
    benchmark.pedantic(timed, args=(None,), setup=setup, rounds=rounds, iterations=1)
    return statistics.median(seconds[None]), {
        name: statistics.median(other / own for own, other in zip(seconds[None], seconds[name], strict=True))
        for name in others
    }


def speed_up(benchmark, step: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float, float]:
    """(median time on two threads, speed-up of two threads over one, that of one large matmul), interleaved.

    Of the wall, as nothing else measures two threads: only an idle machine gives figures that mean something.
    """
    yardstick = LargeMatmul()
    step()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    rates: dict[int, list[float]] = {1: [], 2: []}

    def timed(threads: int) -> None:
        start = time.perf_counter()
        step()
        seconds[threads].append(time.perf_counter() - start)

    def setup() -> None:
        torch.set_num_threads(1)
        rates[1].append(yardstick())
        timed(1)
        torch.set_num_threads(2)
        rates[2].append(yardstick())

    with num_threads(2):
        step()
        benchmark.pedantic(timed, args=(2,), setup=setup, rounds=rounds, iterations=1)
    return (
        statistics.median(seconds[2]),
        statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True)),
        statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True)),
    )


# --------------------------------------------------------------------------------------------------- correctness


def assert_close(what: str, actual: Tensor, exact: Tensor, error: float = 2e-5) -> None:
    """The largest difference is at most `error` times the largest exact entry."""
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    difference = (actual.detach().double() - exact.detach().double()).abs().max().item()
    largest = exact.detach().abs().max().item()
    assert difference <= error * largest, f"{what}: off by {difference:.3e}, largest entry {largest:.3e}"


def assert_same_as(case) -> None:
    """Loss and gradients of a case equal those of its dense form on the same inputs in float64."""
    loss = case.step()
    exact = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in case.arguments
    ]
    value = case.exact(*exact)
    value.backward()
    assert_close("loss", loss, value)
    for x, new in zip(case.arguments, exact, strict=True):
        if x.requires_grad:
            assert_close("gradient", x.grad, new.grad)
