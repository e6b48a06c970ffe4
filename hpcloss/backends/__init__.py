"""Where the primitives run: the only place that knows how.

A backend is a module with `unsupported(tensor) -> list of reasons` and the four functions of `blockwise`:
`pair_lse`, `pair_lse_backward`, `pair_mean`, `pair_mean_backward`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hpcloss.backends import blockwise
from hpcloss.checks import check_backend

BACKENDS: dict[str, ModuleType] = {"blockwise": blockwise}
UNAVAILABLE = {"triton": ["this version ships no Triton kernels"]}


def resolve(backend: str, tensor: Tensor) -> str:
    """Name of the backend that runs a call on `tensor`. An explicit request never falls back."""
    check_backend(backend)
    refusals = []
    for name in (*BACKENDS, *UNAVAILABLE) if backend == "auto" else (backend,):
        reasons = UNAVAILABLE[name] if name in UNAVAILABLE else BACKENDS[name].unsupported(tensor)
        if not reasons:
            return name
        refusals.append(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
    raise NotImplementedError(". ".join(refusals))


def info() -> str:
    """What this installation found, and why the rest is not there: `print(hpcloss.info())`."""
    lines = [f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}"]
    lines += [f"backend {name}: available" for name in BACKENDS]
    lines += [f"backend {name}: not available, {'; '.join(reasons)}" for name, reasons in UNAVAILABLE.items()]
    return "\n".join(lines)
