"""For every test: one seed, and NaN in all memory that torch hands out unwritten."""

import random

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # the suite runs one process a core


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
