"""The native library for the GPU at hand alone, with nvcc, in seconds: setup.py builds it for all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, processes

# As in setup.py, which needs setuptools to be read; a test compares them.
FLAGS = ["-std=c++17", "-O3", "--fmad=false"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-pthread", "-g0", "-fno-fast-math", "-ffp-contract=off"]


def command(target: Path, number: str | None, nvcc: str = "nvcc") -> list[str]:
    """number: the compute capability; None: nvcc finds it out."""
    code = f"-gencode=arch=compute_{number},code=sm_{number}" if number else "-arch=native"
    sources = sorted(
        str(path.relative_to(ROOT)) for pattern in ("*.cu", "*.cpp") for path in (ROOT / "csrc").glob(pattern)
    )
    return [
        nvcc, "-shared", *sources, "-o", str(target), *FLAGS, f"-Xcompiler={','.join(HOST_FLAGS)}",
        code, "-cudart=static", "--threads=0",
    ]  # fmt: skip


def find_nvcc() -> str | None:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def capability() -> str | None:
    """Of the first GPU, as the compiler writes it: "90"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return said.split()[0].replace(".", "")
    return None


class Build:
    """A build that runs while the process of the smoke test starts."""

    def __init__(self, target: Path) -> None:
        nvcc = find_nvcc()
        self.target, self.began = target, time.monotonic()
        self.command = command(target, capability(), nvcc or "nvcc")
        self.log, self.process = target.with_suffix(".log"), None
        if nvcc:
            with self.log.open("w") as output:
                self.process = processes.start(self.command, {}, output)

    def result(self, seconds: float) -> dict[str, Any]:
        """Waits for the end. status: "built", "failed", or "missing" without nvcc."""
        said = {"command": " ".join(self.command)}
        if self.process is None:
            message = "NO NATIVE LIBRARY: there is no nvcc, so PyTorch computes partition and samples"
            return {"status": "missing", "message": message, **said}
        ended = "no result in time"
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = processes.how(self.process.wait(max(seconds, 0.1)))
        processes.end(self.process)
        if self.process.returncode:
            printed = self.log.read_text(errors="replace").strip().splitlines()[-20:]
            return {"status": "failed", "message": "\n".join([f"nvcc: {ended}", *printed]), **said}
        took = round(time.monotonic() - self.began, 1)
        return {"status": "built", "library": str(self.target), "build_seconds": took, **said}
