"""The native library for the GPU at hand alone, with nvcc, in seconds: setup.py builds it for all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT

# As in setup.py, which needs setuptools to be read; a test compares them.
FLAGS = ["-std=c++17", "-O3", "--fmad=false"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-pthread", "-g0", "-fno-fast-math", "-ffp-contract=off"]


def command(target: Path, capability: tuple[int, int], nvcc: str = "nvcc") -> list[str]:
    number = "".join(map(str, capability))
    sources = sorted(
        str(path.relative_to(ROOT)) for pattern in ("*.cu", "*.cpp") for path in (ROOT / "csrc").glob(pattern)
    )
    return [
        nvcc, "-shared", *sources, "-o", str(target), *FLAGS, f"-Xcompiler={','.join(HOST_FLAGS)}",
        f"-gencode=arch=compute_{number},code=sm_{number}", "-cudart=static", "--threads=0",
    ]  # fmt: skip


def find_nvcc() -> str | None:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


class Build:
    """A build that runs beside the steps of the smoke test."""

    def __init__(self, target: Path, capability: tuple[int, int]) -> None:
        self.target, self.nvcc = target, find_nvcc()
        self.command = command(target, capability, self.nvcc or "nvcc")
        self.log = target.with_suffix(".log")
        self.process = None
        target.unlink(missing_ok=True)
        if self.nvcc:
            with self.log.open("w") as output:
                self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)

    def result(self) -> dict[str, Any]:
        """Waits for the end. status: "built", "failed", or "missing" without nvcc."""
        said = {"command": " ".join(self.command)}
        if self.process is None:
            message = "NO NATIVE LIBRARY: there is no nvcc, so partition and samples are those of the PyTorch text"
            return {"status": "missing", "message": message, **said}
        if status := self.process.wait():
            printed = self.log.read_text(errors="replace").strip().splitlines()[-20:]
            return {"status": "failed", "message": "\n".join([f"nvcc ended with {status}", *printed]), **said}
        return {"status": "built", "library": str(self.target), **said}
