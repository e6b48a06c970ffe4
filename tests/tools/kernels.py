"""Where the tests of Triton kernels run: on a GPU, else on the CPU in Triton's interpreter.

`python -m pytest tests/kernels` switches the interpreter on (tests/conftest.py). It computes bf16 wrongly; bf16 is for
GPUs.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
needs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device or TRITON_INTERPRET=1"
)
DTYPES = [torch.float32, torch.float16, *([] if DEVICE.type == "cpu" else [torch.bfloat16])]


def compile_or_skip() -> None:
    """For a module of tests that compile kernels: skip it where Triton is missing or too old, or interprets."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if INTERPRETED:
        pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)
    from hpcloss.backends.triton.probe import OLDEST_TRITON

    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        pytest.skip(f"Triton {triton.__version__} is older than the kernels", allow_module_level=True)
