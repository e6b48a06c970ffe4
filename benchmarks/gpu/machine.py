"""Where the rows run: on a GPU, tiny on the CPU in Triton's interpreter, or launched on a stand-in for the driver.

The supervisor says which by the environment variable HPCLOSS_MACHINE, before any module here is imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu import GPU, INTERPRETER, MACHINE, PREPARE, ROOT, STAND_IN

KIND, _, CAPABILITY = os.environ.get(MACHINE, GPU).partition(":")
ON_GPU, DRY = KIND == GPU, KIND == INTERPRETER
# Kernels are launched and do not run. Results are what the memory held, and no time means anything.
LAUNCHED_ONLY = KIND in (STAND_IN, PREPARE)
FULL_SIZE = KIND in (GPU, PREPARE)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKEND = "triton"
NOTICE = {
    INTERPRETER: "Triton's interpreter on a CPU, tiny sizes: nothing here is a measurement of a GPU",
    STAND_IN: "a stand-in for the driver, tiny sizes: kernels were launched and did not run; nothing is measured",
    PREPARE: "a stand-in for the driver: kernels were launched and did not run; nothing is measured",
}


class Skip(Exception):
    """A row that cannot run here; the message says why."""


def size(full: Any, tiny: Any) -> Any:
    """The size on a GPU, and that of a run without one."""
    return full if FULL_SIZE else tiny


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def output_of(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT).stdout.strip()
    return None


def name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}" + (f", stand-in for sm_{CAPABILITY}" if LAUNCHED_ONLY else "")


def description() -> dict[str, Any]:
    """Device, driver, versions and commit. Asked by a child that has a device."""
    import hpcloss

    commit, changes = output_of("git", "rev-parse", "HEAD"), output_of("git", "status", "--porcelain")
    return {
        "kind": KIND,
        "notice": NOTICE.get(KIND),
        "device": name(),
        "capability": list(torch.cuda.get_device_capability()) if not DRY else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if ON_GPU else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if ON_GPU else None,
        "cores": os.cpu_count(),
        "commit": commit and commit + (" and changes" if changes else ""),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": sys.modules["triton"].__version__ if "triton" in sys.modules else None,
            "numpy": numpy_version(), "hpcloss": hpcloss.__version__,
        },
    }  # fmt: skip


@functools.cache
def numpy_version() -> str | None:
    with contextlib.suppress(ImportError):
        import numpy

        return numpy.__version__
    return None
