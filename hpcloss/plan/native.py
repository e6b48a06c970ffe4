"""The native library (`csrc/`): loaded with ctypes, or the reason why it is missing.

It holds the partition and the samplers in C++ and, if it was built with nvcc, in CUDA. It gives the same integers as
the PyTorch implementation in `sorting.py` and `draw.py`, which runs if `why_not` gives a reason.
`hpcloss.backends.library` calls its functions of floats, which are in C++ only. Functions here take checked, contiguous
tensors of one device and queue their work on its current stream.

The environment variable HPCLOSS_LIBRARY names another library file, which must then load. Empty: no library.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ABI = 1
MAX_AXES = 3
MAX_IGNORED = 16
MAX_SEGMENTS = 2**31 - 2
MAX_ROWS = 2**32 - 1  # rows of a sample
MAX_CUDA_SAMPLES = 4096  # samples of an interval
MAX_CUDA_INTERVALS = 2**29  # intervals of a sample
KINDS = ("uniform", "weighted", "hardest", "hard_easy")

_int64 = ctypes.c_int64  # without types ctypes passes integers as 32 bits
_PACKAGE = Path(__file__).parents[1]  # the folder of the library
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
TYPES = {torch.uint8: 0, torch.int32: 1, torch.int64: 2}
_FUNCTIONS = (
    "add_transpose",
    "class_sort",
    "class_intervals",
    "contrast",
    "label_sort",
    "lse",
    "lse_both_slopes",
    "lse_columns",
    "lse_slopes",
    "pack",
    "pair_counts",
    "pair_counted",
    "sample",
    "sample_positives",
    "unpack",
)
_ERRORS = {
    1: "a required array is missing",
    2: "a size or a count is out of its range",
    3: "an array has a type that it cannot have",
    4: "offsets descend or leave the rows",
    5: "order names a pixel beyond the map",
    6: "the workspace is too small",
    7: "out of memory",
    8: "a CUDA call failed",
}


class NativeError(RuntimeError):
    """The native library refused its arguments or failed."""


class OffsetsError(NativeError, ValueError):
    """Offsets that descend or leave the rows."""


class PixelError(NativeError, IndexError):
    """A pixel index beyond the map."""


class NativeMemoryError(NativeError, MemoryError):
    """The native library could not allocate memory."""


_EXCEPTIONS = {4: OffsetsError, 5: PixelError, 7: NativeMemoryError}


class Regions(ctypes.Structure):
    """`hpcloss_regions` of the C header."""

    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("ids_type", ctypes.c_int32),
        ("axes", ctypes.c_int32),
        ("extent", ctypes.c_int64 * MAX_AXES),
        ("cell", ctypes.c_int64 * MAX_AXES),
        ("per_image", ctypes.c_int32),
    ]


class _Found(NamedTuple):
    library: ctypes.CDLL | None
    reason: str


@functools.cache
def _find() -> _Found:
    """The library, or the reason why it is missing."""
    named = os.environ.get("HPCLOSS_LIBRARY")
    if named == "":
        return _Found(None, "HPCLOSS_LIBRARY is empty")
    if named:
        found = _load(Path(named).resolve())
        if found.library is None:
            raise NativeError(f"HPCLOSS_LIBRARY={named}: {found.reason}")
        return found
    path = _PACKAGE / f"libhpcloss{_SUFFIX}"
    if not path.exists():
        return _Found(None, f"there is no {path.name}; {_build_note() or 'it is built by `pip install`'}")
    return _load(path)


def _load(path: Path) -> _Found:
    try:
        library = ctypes.CDLL(str(path))
        abi = library.hpcloss_abi()
    except (OSError, AttributeError) as error:
        return _Found(None, f"{path.name} cannot be loaded: {error}")
    if abi != ABI:
        return _Found(None, f"{path.name} has ABI version {abi}, this package needs {ABI}; install hpcloss again")
    missing = [name for name in _FUNCTIONS if not hasattr(library, f"hpcloss_{name}")]
    if missing:
        return _Found(None, f"{path.name} has no {', '.join(missing)}; install hpcloss again")
    return _Found(_typed(library), "")


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the result types of its functions set that do not return an int."""
    types = {
        "hpcloss_cuda_error": ctypes.c_char_p,
        "hpcloss_cuda_class_sort_bytes": ctypes.c_int64,
        "hpcloss_cuda_label_sort_bytes": ctypes.c_int64,
        "hpcloss_cuda_sample_bytes": ctypes.c_int64,
    }
    for name, returned in types.items():
        if hasattr(library, name):
            getattr(library, name).restype = returned
    return library


def _build_note() -> str:
    """The note that the installation wrote about the build."""
    note = _PACKAGE / "libhpcloss.txt"
    return "; ".join(note.read_text(encoding="utf-8").split("\n")).strip("; ") if note.exists() else ""


@functools.cache
def why_not(device: str, index: int | None = None) -> str:
    """Why the native library does not serve tensors of a device; empty if it does."""
    library, reason = _find()
    if library is None:
        return reason
    if device == "cpu":
        return ""
    if device != "cuda":
        return f"it has no functions for device {device!r}"
    if torch.version.hip:
        return "its CUDA half does not run on ROCm"
    if not hasattr(library, "hpcloss_cuda_probe"):
        return f"it was built without CUDA; {_build_note() or 'install with HPCLOSS_CUDA=1'}"
    driver, runtime = ctypes.c_int32(), ctypes.c_int32()
    if library.hpcloss_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime)):
        return f"its CUDA runtime does not start: {library.hpcloss_cuda_error().decode()}"
    if not driver.value:
        return "there is no CUDA driver"
    if driver.value // 1000 < runtime.value // 1000:
        built, found = (f"{version.value // 1000}.{version.value % 1000 // 10}" for version in (runtime, driver))
        return (
            f"it was built for CUDA {built}, the driver is for {found}; update the driver, or install with that toolkit"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    with torch.cuda.device(index):
        if library.hpcloss_cuda_probe():
            return f"its kernels do not load on CUDA device {index}: {library.hpcloss_cuda_error().decode()}"
    return ""


def library() -> ctypes.CDLL:
    """The library. NativeError if it is missing."""
    found, reason = _find()
    if found is None:
        raise NativeError(reason)
    return found


def serves(tensor: Tensor) -> bool:
    """Whether the native library has the functions for the tensor's device."""
    device = tensor.device
    return device.type in ("cpu", "cuda") and not why_not(device.type, device.index)


def info() -> str:
    """A line of text about the library."""
    lines = []
    for part, device in (("native library", "cpu"), ("native library, CUDA", "cuda")):
        current = torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else None
        reason = why_not(device, current)
        lines.append(f"{part}: {'not available, ' + reason if reason else 'available'}")
    return "\n".join(lines)


def class_sort(
    labels: Tensor,
    ids: Tensor | None,
    spatial: Sequence[int],
    size: Sequence[int],
    per_image: bool,
    num_regions: int,
    classes: range,
    background: int | None,
    ignore: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`partition.class_sort` of the labels in `classes`. Order and offsets have the dtype."""
    n, num_segments = labels.numel(), num_regions * len(classes)
    order = torch.empty(n, dtype=dtype, device=labels.device)
    offsets = torch.empty(num_segments + 1, dtype=dtype, device=labels.device)
    outside = torch.empty((), dtype=torch.int64, device=labels.device)
    regions, ignored = _regions(ids, spatial, size, per_image), (ctypes.c_int64 * len(ignore))(*ignore)
    first = classes.stop if background is None else background  # the label of rank 0, if it is a class
    arguments = (
        _pointer(labels), TYPES[labels.dtype], _int64(n), ctypes.byref(regions), _int64(num_regions),
        _int64(classes.start), _int64(len(classes)), _int64(first), ignored, _int64(len(ignore)),
        _pointer(order), _pointer(offsets), TYPES[dtype], _pointer(outside),
    )  # fmt: skip
    _call("class_sort", labels.device, arguments, (_int64(n), _int64(num_segments), TYPES[dtype]))
    return order, offsets, outside


def label_sort(
    labels: Tensor,
    ids: Tensor | None,
    spatial: Sequence[int],
    size: Sequence[int],
    per_image: bool,
    num_regions: int,
    background: int | None,
    ignore: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The order and the intervals of `partition.partition` without `num_classes`, in the dtype."""
    n, device = labels.numel(), labels.device
    order, *bounds = [torch.empty(count, dtype=dtype, device=device) for count in [n] * 4 + [num_regions] * 4]
    regions, ignored = _regions(ids, spatial, size, per_image), (ctypes.c_int64 * len(ignore))(*ignore)
    arguments = (
        _pointer(labels), TYPES[labels.dtype], _int64(n), ctypes.byref(regions), _int64(num_regions),
        None if background is None else ctypes.byref(_int64(background)), ignored, _int64(len(ignore)),
        _pointer(order), TYPES[dtype], *(_pointer(bound) for bound in bounds),
    )  # fmt: skip
    _call("label_sort", device, arguments, (_int64(n), TYPES[dtype]))
    return order, *bounds


def _regions(ids: Tensor | None, spatial: Sequence[int], size: Sequence[int], per_image: bool) -> Regions:
    axes = ctypes.c_int64 * MAX_AXES
    return Regions(
        None if ids is None else ids.data_ptr(), TYPES[torch.int64 if ids is None else ids.dtype],
        0 if ids is not None else len(spatial), axes(*spatial), axes(*size), per_image,
    )  # fmt: skip


def class_intervals(offsets: Tensor, n: int, num_classes: int, background_first: bool) -> tuple[Tensor, ...]:
    """The fields of `Intervals` for `ClassRows.pairs`."""
    num_regions = (offsets.numel() - 1) // num_classes
    bounds = [offsets.new_empty(n) for _ in range(3)] + [offsets.new_empty(num_regions) for _ in range(4)]
    arguments = (
        _pointer(offsets), _int64(num_regions), _int64(num_classes), int(background_first), _int64(n),
        TYPES[offsets.dtype], *(_pointer(bound) for bound in bounds),
    )  # fmt: skip
    _call("class_intervals", offsets.device, arguments)
    return tuple(bounds)


def pair_counts(intervals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`Intervals.counts`."""
    counts = (torch.empty_like(intervals[0]), torch.empty_like(intervals[0]))
    _call("pair_counts", intervals[0].device, (*_pairs(intervals), *(_pointer(count) for count in counts)))
    return counts


def pair_counted(intervals: Sequence[Tensor], need_negatives: bool) -> Tensor:
    """`Intervals.counted`."""
    counted = torch.empty_like(intervals[0], dtype=torch.bool)
    _call("pair_counted", counted.device, (*_pairs(intervals), int(need_negatives), _pointer(counted)))
    return counted


def _pairs(intervals: Sequence[Tensor]) -> tuple[object, ...]:
    """The intervals as the library takes them, their number, and their type."""
    rows, bounds = intervals[0], intervals[3]
    if any(len(x) != len(rows) for x in intervals[:3]) or any(len(x) != len(bounds) for x in intervals[3:]):
        raise ValueError(f"intervals must be 3 of rows and 4 of regions, got lengths {[len(x) for x in intervals]}")
    pointers = (_pointer(interval) for interval in intervals)
    return (*pointers, _int64(rows.numel()), _int64(bounds.numel()), TYPES[rows.dtype])


def sample(
    order: Tensor, offsets: Tensor, k: int, kind: str, values: Tensor | None, num_pixels: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """`sampling.sample` and `sample_hard_easy`; values: float32, or bool for "hard_easy"."""
    n, num_intervals = order.numel(), offsets.numel() - 1
    chosen, chosen_offsets = order.new_empty(num_intervals * k), torch.empty_like(offsets)
    code = KINDS.index(kind)
    arguments = (
        _pointer(order), _pointer(offsets), TYPES[order.dtype], _int64(n), _int64(num_intervals), _int64(k), code,
        _pointer(values), _int64(num_pixels), _pointer(seed), _pointer(chosen), _pointer(chosen_offsets),
    )  # fmt: skip
    _call("sample", order.device, arguments, (_int64(n), _int64(num_intervals), _int64(k), code, TYPES[order.dtype]))
    return chosen, chosen_offsets


def sample_positives(pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, seed: Tensor) -> Tensor:
    """`sampling.sample_positives`."""
    rows = pos_start.new_empty(pos_start.numel(), k)
    arguments = (
        _pointer(pos_start), _pointer(pos_end), _pointer(self_pos), TYPES[pos_start.dtype],
        _int64(pos_start.numel()), _int64(k), _pointer(seed), _pointer(rows),
    )  # fmt: skip
    _call("sample_positives", pos_start.device, arguments)
    return rows


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(
    function: str, device: torch.device, arguments: tuple[object, ...], workspace: tuple[object, ...] | None = None
) -> None:
    """Call `hpcloss_<function>` for a device. workspace: numbers that set the size of the CUDA function's workspace."""
    library = _find().library
    if device.type == "cpu":
        raise_on(getattr(library, f"hpcloss_{function}")(*arguments, torch.get_num_threads()), function)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _call_cuda(library, function, device, arguments, workspace, stream)


def _call_cuda(
    library: ctypes.CDLL | None,
    function: str,
    device: torch.device,
    arguments: tuple[object, ...],
    workspace: tuple[object, ...] | None,
    stream: int,
) -> None:
    if workspace is not None:
        size = getattr(library, f"hpcloss_cuda_{function}_bytes")(*workspace)
        buffer = torch.empty(max(size, 16), dtype=torch.uint8, device=device)
        arguments = (*arguments, _pointer(buffer), _int64(buffer.numel()))
    error = getattr(library, f"hpcloss_cuda_{function}")(*arguments, ctypes.c_void_p(stream))
    raise_on(error, function, library)


def raise_on(error: int, function: str, library: ctypes.CDLL | None = None) -> None:
    """Raise the error of an error code of the library. 0: no error."""
    if error:
        text = _ERRORS.get(error, f"error {error}")
        if error == 8 and library is not None:
            text += f": {library.hpcloss_cuda_error().decode()}"
        raise _EXCEPTIONS.get(error, NativeError)(f"hpcloss_{function}: {text}")
