"""Whether kernels may run on a device, as far as it is known without building one. `trial.py` builds some."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

OLDEST = (7, 5)
OLDEST_TRITON = (3, 4)  # older compilers accept no tuple of tensors


@triton.jit
def _touch(pointer):
    tl.store(pointer, 1.0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. TRITON_INTERPRET decides it when they are first imported."""
    return not isinstance(_touch, triton.runtime.JITFunction)


def why_not(device: str, index: int | None) -> str | None:
    """Why kernels cannot run on the device, with the fix if there is one. None if they can."""
    if interpreted():
        return None if device == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, the tensor is on {device!r}"
    if device != "cuda":
        return f"its kernels run on CUDA devices, the tensor is on {device!r} (TRITON_INTERPRET=1 interprets them)"
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if (refused := refused_on_rocm()) is not None:
        return refused
    if torch.cuda.get_device_capability(index) < OLDEST:
        return f"{torch.cuda.get_device_name(index)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def refused_on_rocm() -> str | None:
    """Why kernels do not run on AMD devices, unless the environment asks to try. None on other devices."""
    if not torch.version.hip or os.environ.get("HPCLOSS_ROCM") == "1":
        return None
    return "on AMD devices its kernels have been compiled but never run (set HPCLOSS_ROCM=1 to try them)"
