"""For every test: one seed, NaN in all memory that torch hands out unwritten, and a process that its kernels can use.

Triton reads TRITON_INTERPRET when it is imported. Without a GPU, tests/kernels need its interpreter and tests/compiled
its compiler, so one process runs one of the two folders. `pytest tests/kernels` switches the interpreter on. A folder
that does not run is named at the end of the session.
"""

import importlib.util
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS, COMPILED = HERE / "kernels", HERE / "compiled"
LEFT_OUT = pytest.StashKey[dict[Path, str]]()


def pytest_addoption(parser):
    parser.addoption("--configurations", type=int, default=10_000, help="how many tests/tools/stress.py draws")
    parser.addoption("--seed", type=int, default=0, help="which of them")


def pytest_configure(config):
    torch.set_num_threads(1)  # the suite runs one process a core
    config.stash[LEFT_OUT] = left_out(config)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


def left_out(config):
    """Folders of kernel tests that cannot run in this process, with the reason and the remedy.

    Switches Triton's interpreter on where nothing but tests/kernels is asked for. A folder that was named and cannot
    run is a usage error; one that a larger folder contains is left out.
    """
    asked = [(config.invocation_params.dir / str(arg).split("::")[0]).resolve() for arg in config.args]
    if "triton" not in sys.modules and all(path.is_relative_to(KERNELS) for path in asked) and can_interpret():
        os.environ["TRITON_INTERPRET"] = "1"
    ignored = [Path(path).resolve() for path in config.getoption("ignore") or ()]
    found = {}
    for folder in {KERNELS, COMPILED}.difference(ignored):
        if any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in asked):
            if reason := why_not(folder):
                found[folder] = reason
            if reason and any(path.is_relative_to(folder) for path in asked):
                raise pytest.UsageError(f"{folder.relative_to(HERE.parent)} cannot run here: {reason}")
    return found


def can_interpret():
    return importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()


def why_not(folder):
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if folder == COMPILED and interpreted:
        return "TRITON_INTERPRET=1 is set, and these tests compile. Run `python -m pytest tests/compiled` without it"
    if folder == KERNELS and not interpreted and not torch.cuda.is_available():
        return "there is no GPU, and this process does not interpret. `python -m pytest tests/kernels` alone does"
    return ""


def pytest_ignore_collect(collection_path, config):
    return True if collection_path in config.stash[LEFT_OUT] else None


def pytest_terminal_summary(terminalreporter, config):
    for folder, reason in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"NOT RUN: {folder.relative_to(HERE.parent)}: {reason}.", red=True, bold=True)


class Progress:
    """A line after each part of the random configurations of tests/tools/stress.py."""

    def __init__(self, config):
        self.config, self.began, self.done, self.failures = config, time.monotonic(), 0, 0

    def pytest_runtest_logreport(self, report):
        numbers = dict(report.user_properties)
        if report.when == "call" and "configurations" in numbers:
            self.done += numbers["configurations"]
            self.failures += numbers["failures"]
            seconds = time.monotonic() - self.began
            line = f"{self.done} configurations, {seconds:.0f} s, {self.failures} failures"
            self.config.get_terminal_writer().line(f"\n{line}", flush=True)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty and its kin are filled with NaN, and with the largest value of integers: what nobody wrote, shows.

    Not in tests that compile (names with "compile"), which write their own memory.
    """
    poison = "compile" not in request.node.name
    torch.use_deterministic_algorithms(poison, warn_only=True)  # without this torch does not fill
    torch.utils.deterministic.fill_uninitialized_memory = poison
    yield
    torch.use_deterministic_algorithms(False)
