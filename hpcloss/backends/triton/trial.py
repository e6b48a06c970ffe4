"""Whether the kernels compute correctly on a device: one small step of them, compared with the PyTorch tiles.

The step packs a map, takes the log-sum-exp over the negatives and brings a gradient back to the map. It has the dtype
and the width of the call that asks, so the loss that follows uses most of its kernels again.

Other widths, rules and terms are not tried, and neither is a kernel that is right for 240 rows and wrong for more. An
address outside a tensor breaks the CUDA context. Then nothing runs on this device, PyTorch's tiles included.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.backends import blockwise
from hpcloss.backends import triton as kernels
from hpcloss.backends.triton import configs, launch
from hpcloss.backends.triton.probe import _touch
from hpcloss.plan.partition import Pairs, partition

IMAGES, PIXELS, CLASSES = 2, 120, 3  # several tiles each way, which end inside and outside of classes
SCALE = 10.0
# Largest error relative to the largest entry: a few times the rounding error of unit rows of 16 to 512 channels.
TOLERANCE = {"half": 1e-2, "tf32": 1e-2, "ieee": 1e-4}
FIX = "Triton needs a C compiler, the Python headers and a driver of its CUDA version"


class Step(NamedTuple):
    """The results of a step."""

    rows: Tensor
    sums: Tensor  # sums of exponentials relative to the largest possible one
    gradient: Tensor


def failure(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[str, bool]:
    """Why the kernels do not serve on a device ("" if they do), and whether that lasts.

    The step runs in a thread of its own. The caller may be tracing with fake tensors, or under other modes of torch;
    all of these belong to a thread.
    """
    found: list[tuple[str, bool]] = []
    thread = threading.Thread(target=lambda: found.append(_failure(device, dtype, channels)), daemon=True)
    thread.start()
    thread.join()
    return found[0]


def _failure(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[str, bool]:
    try:
        _build(device)
    except Exception as error:  # compiler, headers and driver raise many types; only the reason matters
        return f"a kernel cannot be built here: {_said(error)} ({FIX})", _lasts(error)
    about = f"a small step in {str(dtype).removeprefix('torch.')} with {channels} channels"
    try:
        wrong = _wrong(device, dtype, channels)
    except Exception as error:
        return f"{about} fails: {_said(error)}", _lasts(error)
    return f"{about} computes wrong numbers: {wrong}" if wrong else "", True


def _build(device: torch.device) -> None:
    """The smallest kernel. If it fails, no other can be built."""
    touched = torch.zeros(1, device=device)  # also makes the device's context current in this thread
    launch.run(_touch, 1, touched, touched)


def _wrong(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    features = _features(channels).to(dtype)
    pairs = partition(*_labels(), IMAGES, ignore_index=(255,))
    with _waiting(device):
        step = _step(
            kernels,
            features.to(device),
            pairs.to(device),
        )
        tolerance = TOLERANCE[configs.precision(step.rows)]
        step = Step(*[result.cpu() for result in step])
    exact = _step(blockwise, features.double(), pairs)
    return disagreement(step, exact, tolerance)


@contextlib.contextmanager
def _waiting(device: torch.device) -> Iterator[None]:
    """Let the host wait for the device here, even while a training looks for synchronisations."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _features(channels: int) -> Tensor:
    """A map of different pixels, drawn without the generator of the training."""
    generator = torch.Generator("cpu")  # the same numbers in every trial
    return torch.randn(IMAGES, channels, PIXELS, generator=generator, dtype=torch.float32, device="cpu")


def _labels() -> tuple[Tensor, Tensor]:
    """Labels of the pixels, some of them ignored, and their regions, which are the images."""
    pixel = torch.arange(IMAGES * PIXELS, device="cpu")
    return torch.where(pixel % 11 == 0, 255, pixel * 7 // 5 % CLASSES), pixel // PIXELS


def _step(backend: ModuleType, features: Tensor, pairs: Pairs) -> Step:
    """Forward and backward on one of the backends."""
    at, scale = list(pairs.intervals), torch.full((), SCALE, dtype=torch.float32, device=features.device)
    rows, inverse_norm = backend.pack(features, pairs.order, pairs.live(), True)
    scale = scale.to(inverse_norm.dtype)
    lse = backend.pair_lse(rows, None, None, scale, SCALE, at, "negatives")
    grad = torch.linspace(0.5, 1.5, len(lse), dtype=lse.dtype, device=lse.device)
    grad_rows, _, _ = backend.pair_lse_backward(
        grad, lse, rows, None, None, scale, SCALE, at, "negatives", True, False, False
    )
    layout = list(features.shape), list(features.stride()), features.dtype
    gradient = backend.pack_backward(grad_rows, rows, inverse_norm, pairs.order, True, *layout, True)
    return Step(rows, torch.exp(lse - SCALE), gradient)


def disagreement(step: Step, exact: Step, tolerance: float) -> str:
    """The results that differ from those of the exact step, and by how much; "" if none does."""
    wrong = []
    for name, result, right in zip(Step._fields, step, exact):
        error = float((result.double() - right).abs().max() / right.abs().max())
        if not error <= tolerance:  # NaN too
            wrong.append(f"{name} off by {error:.2g} of the largest entry")
    return f"{', '.join(wrong)} (at most {tolerance:g} is rounding)" if wrong else ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a word'])[-1]}"


def _lasts(error: Exception) -> bool:
    """Whether a failure lasts.

    A lack of memory does not, nor does an operation forbidden by another thread's capture.
    """
    passes = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return not passes and not any(words in str(error) for words in ("out of memory", "captur"))
