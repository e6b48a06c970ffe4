"""For every test: one seed, and NaN in all memory that torch hands out unwritten."""

import random
import time

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--configurations", type=int, default=10_000, help="how many tests/stress.py draws")
    parser.addoption("--seed", type=int, default=0, help="which of them")


def pytest_configure(config):
    torch.set_num_threads(1)  # the suite runs one process a core
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


class Progress:
    """A line after each part of the random configurations of tests/stress.py."""

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
