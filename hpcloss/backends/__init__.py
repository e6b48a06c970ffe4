"""Where the primitives run: the only place that knows how.

A backend is a package here with the same functions: `rows_dtype`, `pack`, `pair_lse`, `pair_lse_both`, `pair_mean` and
their `_backward`, and `segment_mean`. Nothing of Triton is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import warnings
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from hpcloss import native
from hpcloss.checks import RULES
from hpcloss.sorting import INT32_MAX

AUTO = ("triton", "blockwise")  # fastest first
MAX_CHANNELS = 512  # of a row of the Triton kernels
_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def load(name: str) -> ModuleType:
    """The backend of this name, imported when first asked for."""
    return importlib.import_module(f"hpcloss.backends.{name}")


def resolve(backend: str, tensor: Tensor) -> str:
    """Name of the backend that runs a call on `tensor` [., D, ...]. An explicit request never falls back."""
    RULES["backend"]("backend", backend)
    if backend == "auto" and tensor.device.type == "cpu":
        return "blockwise"
    refusals = []
    for name in AUTO if backend == "auto" else (backend,):
        reasons = unsupported(name, tensor)
        if not reasons:
            return name
        refusals.append(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
    raise NotImplementedError(". ".join(refusals))


def unsupported(name: str, tensor: Tensor) -> list[str]:
    """Reasons why a backend cannot run a call on `tensor` [., D, ...]."""
    if name == "blockwise":
        return ["device 'mps' has no float64"] if tensor.device.type == "mps" else []
    reasons = list(_triton_refusals(tensor.device.type, tensor.device.index, tensor.dtype))
    if tensor.shape[1] > MAX_CHANNELS:
        reasons.append(f"at most {MAX_CHANNELS} channels fit its tiles, got {tensor.shape[1]}")
    if tensor.numel() // max(tensor.shape[1], 1) > INT32_MAX:
        reasons.append("row numbers beyond 2^31")
    return reasons


def _triton_refusals(device: str, index: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    refused = _triton_missing(device, index)
    return (*refused, "float64 needs backend 'blockwise'") if dtype == torch.float64 else refused


# What `torch.compiler.assume_constant_result` sets; calling it would import the compiler, and Triton, at once.
_triton_refusals._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _triton_missing(device: str, index: int | None) -> tuple[str, ...]:
    """What keeps Triton from running on a device; asked once a process, and on a GPU told once."""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (pip install triton)"
        told = platform.system() == "Linux"  # elsewhere there is none
    else:
        told = True
        try:
            reason = load("triton.probe").why_not(device, index)
        except ImportError as error:
            reason = f"Triton cannot be imported: {error}"
    if reason and told and device == "cuda":
        warnings.warn(f"hpcloss runs its PyTorch tiles on this GPU, not its kernels: {reason}", stacklevel=2)
    return (reason,) if reason else ()


def info() -> str:
    """What this installation found, and why the rest is not there: `print(hpcloss.info())`."""
    cuda = torch.cuda.is_available()
    lines = [
        f"hpcloss: imported from {_PACKAGE}{_installation()}",
        f"torch {torch.__version__}, CUDA {'available' if cuda else 'not available'}",
        "backend blockwise: available",
    ]
    refused = _triton_refusals("cuda" if cuda else "cpu", torch.cuda.current_device() if cuda else None, torch.float32)
    lines.append(f"backend triton: {'not available, ' + '; '.join(refused) if refused else 'available'}")
    return "\n".join([*lines, native.info()])


def _installation() -> str:
    """What to say of the installation: nothing where it is the package that was imported."""
    found = [(one.version, _folder(one)) for one in importlib.metadata.distributions(name="hpcloss")]
    if not found:
        return ", which is not installed"
    others = [f"{version} in {folder}" for version, folder in found if folder != _PACKAGE]
    return f", not the installed {others[0]}" if others else ""


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    """Where the package of a distribution is: of an editable one in its checkout."""
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(source["url"]).path), "hpcloss").resolve()
    return Path(str(distribution.locate_file("hpcloss"))).resolve()
