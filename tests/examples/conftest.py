"""Fixtures of the examples. Imports wait for a test: the libraries of the examples may be missing."""

from functools import partial

import pytest
import torch


@pytest.fixture(scope="module")
def msd(tmp_path_factory):
    from tests.tools.small_folders import write_msd

    return write_msd(tmp_path_factory.mktemp("msd"), cases=8)


@pytest.fixture(scope="module")
def slices(msd):
    from examples.data.folders import read_folder

    return read_folder(msd)


@pytest.fixture(scope="module")
def small_and_steady():
    """Short probes, and one thread: tiny tensors gain nothing from more, and tests that run beside lose much."""
    from examples import probes, three_stage
    from examples.settings import Settings

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(probes, "VIEWS", 1)
        patch.setattr(three_stage, "Settings", partial(Settings, probe_iterations=2))
        yield
    torch.set_num_threads(threads)
