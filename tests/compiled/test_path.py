"""The way of one tensor from a module to its kernel is short: DESIGN.md lists it, and this walks it."""

import traceback
from pathlib import Path

import pytest
import torch

import hpcloss
from hpcloss.backends.triton import launch
from hpcloss.primitives import rows as row_primitives
from tests.tools import offline
from tests.tools.cases import choice, rows

PACKAGE = Path(hpcloss.__file__).parent
DESIGN = (PACKAGE / "DESIGN.md").read_text(encoding="utf-8")
MOST_CALLS, MOST_FILES = 8, 6


class Kernel:
    """Stands for a kernel: keeps the way on which it was started."""

    def __init__(self, kernel, ways):
        self.kernel, self.ways = kernel, ways

    def __getitem__(self, grid):
        return self.start

    def start(self, *args, **constants):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        way = [(str(Path(frame.filename).relative_to(PACKAGE)), frame.name) for frame in frames]
        self.ways[f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"] = way


@pytest.fixture
def ways(monkeypatch):
    """The way to each kernel of the forward pass of a loss, as (file, function) of every call."""

    def walk(module, *inputs):
        found, run = {}, launch.run

        def watched(kernel, *args, **options):
            return run(Kernel(kernel, found), *args, **options)

        monkeypatch.setattr(launch, "run", watched)
        monkeypatch.setattr(row_primitives, "resolve", lambda name, tensor: "triton")
        monkeypatch.setattr(offline.configs, "capability", lambda device: 90)
        module(*inputs)
        return {name: [call for call in way if call[1] != "watched"] for name, way in found.items()}

    return walk


def test_from_a_region_loss_to_its_kernels(ways):
    features, labels = rows(2, 16, 8, 8, dtype=torch.float16).requires_grad_(), choice([0, 1, 2], 2, 8, 8)
    found = ways(hpcloss.RegionPHPCLoss(4), features, labels)
    assert {"rows.pack_kernel", "pair_lse.forward_kernel", "pair_mean.forward_kernel"} <= set(found)
    for name, way in found.items():
        assert way[0] == ("losses/region.py", "forward") and way[-1] == ("backends/triton/launch.py", "run")
        # From call to call, and the last one is the kernel's.
        assert len(way) <= MOST_CALLS, f"{name}: {way}"
        assert len({file for file, _ in way}) <= MOST_FILES, f"{name}: {way}"


@pytest.mark.parametrize("kernel", ["pair_lse.forward_kernel"])
def test_the_way_that_the_design_shows(ways, kernel):
    """Line by line: the file and the function of every call, in this order."""
    features, labels = rows(2, 16, 8, 8, dtype=torch.float16).requires_grad_(), choice([0, 1, 2], 2, 8, 8)
    way = ways(hpcloss.RegionPHPCLoss(4), features, labels)[kernel]
    shown = [line.split() for line in DESIGN.split("```way\n")[1].split("```")[0].splitlines()]
    assert [(file, function) for _, file, function, *_ in shown] == way
