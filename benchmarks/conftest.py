"""`pytest benchmarks --benchmark-only`; `--results FILE` writes the session's figures for `plot.py`."""

from __future__ import annotations

import warnings

import pytest
import torch
from measure import Bar, Rows, num_threads

ROWS = pytest.StashKey[Rows]()


def pytest_addoption(parser):
    parser.addoption(
        "--results", metavar="FILE", help="write the measured figures as JSON, e.g. benchmarks/results/cpu.json"
    )


def pytest_configure(config):
    config.stash[ROWS] = Rows()


@pytest.fixture(scope="session", autouse=True)
def _quiet_compiler():
    """Warnings are errors here, but not those of torch's compiler."""
    with warnings.catch_warnings():
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Figures are per core unless a benchmark says otherwise."""
    with num_threads(1):
        yield


@pytest.fixture(scope="session")
def rows(request) -> Rows:
    return request.config.stash[ROWS]


@pytest.fixture
def report(request, benchmark, rows):
    """report(figures, bars): puts them into the benchmark's `extra_info` and among the session's rows."""

    def add(seconds: float | None, bars: list[Bar] | None = None, **figures: object) -> None:
        figures = {name: round(x, 6) if isinstance(x, float) else x for name, x in figures.items() if x is not None}
        benchmark.extra_info.update(figures)
        for number, bar in enumerate(bars or []):
            for name, x in bar.as_dict().items():
                benchmark.extra_info[name if number == 0 else f"{name}_{number + 1}"] = x
        parameters = dict(request.node.callspec.params) if hasattr(request.node, "callspec") else {}
        seconds = None if seconds is None else round(seconds, 6)
        figures = {"group": benchmark.group, "seconds": seconds, "threads": torch.get_num_threads(), **figures}
        rows.add(request.node.name, parameters, figures, bars or [])

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    lines = list(rows.table())
    if lines:
        terminalreporter.section("bars (a busy machine misses some; nothing fails for it)")
        for line in lines:
            terminalreporter.write_line(line)
    for row in rows.rows:
        if "note" in row:
            terminalreporter.write_line(f"note   {row['name']}: {row['note']}")


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--results"), session.config.stash[ROWS]
    if path and rows.rows:
        rows.write(path)
