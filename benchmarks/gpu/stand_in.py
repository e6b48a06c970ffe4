"""The tests' stand-in for NVIDIA's driver (tests/tools/launch_path.py), for runs that only launch kernels."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

from benchmarks.gpu import ROOT
from benchmarks.gpu.machine import CAPABILITY

sys.path.append(str(ROOT))

from tests.tools import launch_path  # noqa: E402


def environment(folder: Path) -> dict[str, str]:
    """Builds the stand-in; the environment of a process that finds it in place of the driver."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "libcuda.so.1").exists():
        launch_path.build(folder)
    return {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


class StandIn:
    """The stand-in in this process, whose environment names it."""

    def __init__(self) -> None:
        self.stack: contextlib.ExitStack = launch_path.device(int(CAPABILITY))
        self.driver = launch_path.Driver(int(CAPABILITY))

    def launches(self) -> Counter[str]:
        """How often each kernel was launched, by name."""
        found: Counter[str] = Counter()
        for (name, _), count in self.driver.launches().items():
            found[name] += count
        return found
