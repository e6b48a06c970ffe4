"""The choice of the backend that runs the primitives.

A backend is a package here with the same functions: `rows_dtype`, `pack`, `pair_lse`, `pair_lse_both`,
`pair_cross_entropy`, `pair_mean` and their `_backward`, and `segment_mean`; those of PyTorch also have `one_positive`.
Triton is not imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import platform
import threading
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from hpcloss.backends import evidence
from hpcloss.checks import backend_name
from hpcloss.operators import load
from hpcloss.plan import native
from hpcloss.plan.sorting import INT32_MAX

AUTO = ("triton", "pytorch")  # fastest first
MAX_CHANNELS = 512  # channels of a row in the Triton kernels
NOT_INSTALLED = "Triton is not installed (pip install triton)"
WIDTHS = (16, 32, 64, 128, 256)  # channels in trials, besides MAX_CHANNELS
_PACKAGE = Path(__file__).resolve().parents[1]


def resolve(backend: str, tensor: Tensor) -> str:
    """Name of the backend that runs a call on `tensor` [., D, ...]. A named backend never falls back.

    "pytorch" is the dense backend or the tiles, chosen for each call (`hpcloss.backends.pytorch`).
    """
    if backend == "pytorch" or (backend == "auto" and tensor.device.type == "cpu"):
        return "pytorch"
    backend_name("backend", backend)
    refusals = []
    for name in AUTO if backend == "auto" else (backend,):
        reasons = unsupported(name, tensor, falls_back=backend == "auto")
        if not reasons:
            return name
        refusals.append(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
    raise NotImplementedError(". ".join(refusals))


def unsupported(name: str, tensor: Tensor, *, falls_back: bool = False) -> list[str]:
    """Reasons why a backend cannot run a call on `tensor` [., D, ...].

    falls_back: another backend takes the call if this one cannot. On a GPU a warning says so, once.
    """
    if name in ("dense", "blockwise", "pytorch"):
        return ["device 'mps' has no float64"] if tensor.device.type == "mps" else []
    place = tensor.device.type, tensor.device.index
    reasons = list(_triton_missing(*place, falls_back))
    if tensor.dtype == torch.float64:
        reasons.append("float64 needs backend 'blockwise' or 'dense'")
    if tensor.shape[1] > MAX_CHANNELS:
        reasons.append(f"at most {MAX_CHANNELS} channels fit its tiles, got {tensor.shape[1]}")
    if tensor.numel() // max(tensor.shape[1], 1) > INT32_MAX:
        reasons.append("at most 2^31 - 1 rows fit its row numbers, got more")
    # No kernel is built for a call that no kernel can run.
    return reasons or list(_triton_failing(*place, tensor.dtype, _width(tensor.shape[1]), falls_back))


def available(tensor: Tensor) -> list[str]:
    """Backends of the device of `tensor` [., D, ...]. No kernel has been tried: a call may still refuse "triton"."""
    found = [name for name in ("dense", "blockwise") if not unsupported(name, tensor)]
    return found if _triton_missing(tensor.device.type, tensor.device.index, False) else [*found, "triton"]


def _width(channels: int) -> int:
    """Channels of a trial: the next of a few widths. It is a number, also where the compiler has a symbol."""
    for width in WIDTHS:
        if channels <= width:
            return width
    return MAX_CHANNELS


def _triton_missing(device: str, index: int | None, falls_back: bool) -> tuple[str, ...]:
    """Reasons against Triton's kernels on a device that are known without building one."""
    reason = _triton_refusal(device, index)
    # Other systems have no Triton, so there is nothing to say.
    if reason and falls_back and (reason != NOT_INSTALLED or platform.system() == "Linux"):
        _tell(device, index, reason)
    return (reason,) if reason else ()


@functools.cache
def _triton_refusal(device: str, index: int | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    try:
        return load("triton.probe").why_not(device, index) or ""
    except Exception as error:  # a broken package, or versions that do not match
        return f"Triton cannot be imported: {type(error).__name__}: {error}"


_found: dict[tuple[str, int | None, torch.dtype], str] = {}  # results of trials; "": no failure
_trying = threading.RLock()


def _triton_failing(
    device: str, index: int | None, dtype: torch.dtype, channels: int, falls_back: bool
) -> tuple[str, ...]:
    """Reasons against Triton's kernels on a device in a dtype, found by a trial. There is one trial in a process.

    There is no trial while a CUDA graph is captured, because the host must not wait then. `auto` takes the PyTorch
    tiles, and the graph keeps them; a named backend runs untried. This answer is not remembered, and neither is a lack
    of memory: the next call asks again. Under `torch.compile` the question is asked while tracing, and the compiled
    code keeps the answer.
    """
    reason, lasts = _found.get((device, index, dtype)), True
    if reason is None:
        with _trying:  # a second thread waits for the first one's result
            reason, lasts = _trial(device, index, dtype, channels, falls_back)
    if reason and falls_back:
        _tell(device, index, reason, lasts)
    return (reason,) if reason else ()


def _trial(device: str, index: int | None, dtype: torch.dtype, channels: int, falls_back: bool) -> tuple[str, bool]:
    """The reason against the kernels, and whether it lasts. A lasting reason is remembered."""
    key = device, index, dtype
    if key in _found:
        return _found[key], True
    if load("triton.probe").interpreted():
        reason, lasts = "", True
    elif device == "cuda" and torch.cuda.is_current_stream_capturing():
        reason, lasts = _CAPTURING if falls_back else "", False
    else:
        place = torch.device(device if index is None else f"{device}:{index}")
        reason, lasts = load("triton.trial").failure(place, dtype, channels)
    if lasts:
        _found[key] = reason
    return reason, lasts


_CAPTURING = (
    "a CUDA graph is being captured and no step has run before, so the kernels cannot be tried"
    " (run one step before the capture)"
)
_told: set[tuple[str, int | None, str]] = set()


def _tell(device: str, index: int | None, reason: str, lasts: bool = True) -> None:
    """Warn once why a GPU runs without the kernels. Of reasons that do not last, only the first is told."""
    key = device, index, reason if lasts else "for now"
    with _trying:
        if device != "cuda" or key in _told:
            return
        _told.add(key)
    until = "" if lasts else " for now"
    warnings.warn(
        f"hpcloss uses its PyTorch implementation on this GPU{until}, not its Triton kernels: {reason}", stacklevel=2
    )


def forget() -> None:
    """Forget what can run on each device, as in a new process."""
    _triton_refusal.cache_clear()
    _found.clear()
    _told.clear()


# As `torch.compiler.assume_constant_result` does. A call of it would import the compiler and Triton at once.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_triton_failing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def info() -> str:
    """Describe this installation: the imported copy, the backends, the native library, and why a part is missing.

    Returns:
        Several lines of text, for `print(hpcloss.info())`.

    Examples:
        >>> import hpcloss
        >>> print(hpcloss.info())  # doctest: +ELLIPSIS
        hpcloss: imported from ...
        backend dense: available
        ...
    """
    cuda = torch.cuda.is_available()
    lines = [
        f"hpcloss: imported from {_PACKAGE}{_installation()}",
        f"torch {torch.__version__}, CUDA {'available' if cuda else 'not available'}",
        "backend dense: available",
        "backend blockwise: available",
    ]
    device, index = ("cuda", torch.cuda.current_device()) if cuda else ("cpu", None)
    missing = _triton_missing(device, index, False)
    refused = missing or _triton_failing(device, index, torch.float16, 64, False)
    lines.append(f"backend triton: {'not available, ' + '; '.join(refused) if refused else 'available'}")
    if torch.version.hip:
        lines.append(evidence.AMD)
    elif cuda and not missing:
        configs = load("triton.configs")
        capability = configs.capability(index)
        part = configs.part(capability)
        lines.append(evidence.of(capability, part, is_known=part != configs.SMALLEST))
    return "\n".join([*lines, native.info()])


def _installation() -> str:
    """A note on the installation; empty if the installed package is the imported one."""
    found = [(one.version, _folder(one)) for one in importlib.metadata.distributions(name="hpcloss")]
    if not found:
        return ", which is not installed"
    others = [f"{version} in {folder}" for version, folder in found if folder != _PACKAGE]
    return f", not the installed {others[0]}" if others else ""


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    """The folder of a distribution's package. An editable one is in its checkout."""
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(source["url"]).path), "hpcloss").resolve()
    return Path(str(distribution.locate_file("hpcloss"))).resolve()
