"""The native library's functions of floats (`csrc/`): CPU tensors in fp32, contiguous unless stated otherwise.

They give the results of the PyTorch code beside them, up to rounding. The library checks its arguments.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.plan import native

FORMS = ("own", "negatives", "all", "pair")
RULES = ("positives", "negatives", "others", "every")


class ContrastOptions(ctypes.Structure):
    """`hpcloss_contrast_options` of the C header."""

    _fields_ = [
        ("form", ctypes.c_int32),
        ("differentiated", ctypes.c_int32),
        ("of_weights", ctypes.c_float),
        ("damped", ctypes.c_float),
        ("log2_multiplicity", ctypes.c_float),
    ]


class Rows(ctypes.Structure):
    """`hpcloss_rows` of the C header."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("rows_of_region", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("first_key", ctypes.c_int64),
        ("pos_start", ctypes.c_void_p),
        ("pos_end", ctypes.c_void_p),
        ("self_pos", ctypes.c_void_p),
        ("index_type", ctypes.c_int32),
    ]


# The argument types of each function. With them ctypes accepts plain integers as pointers.
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_ARGUMENTS = {
    "add_transpose": (_P, _L, _P, _P, _I),
    "contrast": (_P, _L, _L, _L, _L, _P, _P, _P, _I, _P, _I, _P, _P, _P, _I),
    "lse": (_P, _P, _I, _P, _I, _P, _I),
    "lse_both_slopes": (_P, _P, _I, _P, _P, _P, _P, _I),
    "lse_columns": (_P, _P, _I, _P),
    "lse_slopes": (_P, _P, _I, _P, _I, _P, _P, _I),
    "pack": (_P, _P, _P, _I, _L, _L, _I, _P, _P, _I),
    "unpack": (_P, _P, _P, _P, _P, _I, _L, _I, _P, _I),
}


class Map(ctypes.Structure):
    """`hpcloss_map` of the C header."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("images", "pixels", "channels", "image_stride", "pixel_stride", "channel_stride")
    ]


Strides = tuple[int, int, int]  # between images, pixels and channels


def _library() -> ctypes.CDLL:
    return _told(native.library())


@functools.cache
def _told(found: ctypes.CDLL) -> ctypes.CDLL:
    """A library with the argument types of its functions set."""
    for name, arguments in _ARGUMENTS.items():
        getattr(found, f"hpcloss_{name}").argtypes = arguments
    return found


@functools.lru_cache(maxsize=64)
def contrast_options(
    form: str, differentiated: bool, of_weights: float, damped: float, log2_multiplicity: float
) -> ContrastOptions:
    """The options of `contrast`, as the C header names them."""
    return ContrastOptions(FORMS.index(form), differentiated, of_weights, damped, log2_multiplicity)


def rows_of(
    logits: Tensor, rows_of_region: int, first_key: int, bounds: Sequence[Tensor], first_row: int
) -> tuple[Tensor, Rows]:
    """Logits [rows, keys] of the rows from `first_row` on, as the functions of log-sum-exps take them.

    bounds: pos_start, pos_end and self_pos of all rows, which must outlive the result.
    """
    kind, at = bounds[0].dtype, first_row * bounds[0].element_size()
    pointers = [bound.data_ptr() + at for bound in bounds]
    return logits, Rows(logits.shape[0], rows_of_region, logits.shape[1], first_key, *pointers, native.TYPES[kind])


@functools.lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


def lse(rows: tuple[Tensor, Rows], rule: str, factors: tuple[float, ...], found: Tensor) -> None:
    """found [rows, factors] <- log2 of the sums of 2^(factor logit) over the keys of the rule."""
    logits, at = rows
    error = _library().hpcloss_lse(
        logits.data_ptr(), ctypes.addressof(at), RULES.index(rule), _floats(factors), len(factors), found.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    native.raise_on(error, "lse")


def lse_slopes(rows: tuple[Tensor, Rows], rule: str, factors: tuple[float, ...], found: Tensor, grad: Tensor) -> None:
    """Write the slopes of `lse` by the logits over them, weighted by grad [rows, factors]."""
    logits, at = rows
    error = _library().hpcloss_lse_slopes(
        logits.data_ptr(), ctypes.addressof(at), RULES.index(rule), _floats(factors), len(factors), found.data_ptr(),
        grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.raise_on(error, "lse_slopes")


def lse_columns(rows: tuple[Tensor, Rows], rule: str, found: Tensor) -> None:
    """found [regions * keys] <- log2 of the sums of 2^logit over the rows that count the key."""
    logits, at = rows
    error = _library().hpcloss_lse_columns(logits.data_ptr(), ctypes.addressof(at), RULES.index(rule), found.data_ptr())
    native.raise_on(error, "lse_columns")


def lse_both_slopes(rows: tuple[Tensor, Rows], rule: str, *of_rows_and_columns: Tensor) -> None:
    """Write the slopes of both over the logits. The rows' log2-sums and gradients, then those of the columns."""
    logits, at = rows
    pointers = [x.data_ptr() for x in of_rows_and_columns]
    error = _library().hpcloss_lse_both_slopes(
        logits.data_ptr(), ctypes.addressof(at), RULES.index(rule), *pointers, torch.get_num_threads()
    )
    native.raise_on(error, "lse_both_slopes")


def contrast(
    logits: Tensor,
    rows_of_region: int,
    first_key: int,
    bounds: Sequence[Tensor],
    first_row: int,
    options: ContrastOptions,
    needs_slopes: bool,
    loss: Tensor,
    counted: Tensor,
    by_scale: Tensor | None,
) -> None:
    """Losses of the rows from `first_row` on, of `loss`, `counted` and `by_scale` [N], and their slopes in place of the
    logits [rows, keys]. bounds: pos_start, pos_end and self_pos [N]. CPU tensors, fp32."""
    kind, at = bounds[0].dtype, first_row * bounds[0].element_size()
    pointers = [bound.data_ptr() + at for bound in bounds]
    error = _library().hpcloss_contrast(
        logits.data_ptr(), logits.shape[0], rows_of_region, logits.shape[1], first_key, *pointers, native.TYPES[kind],
        ctypes.addressof(options), needs_slopes, loss.data_ptr() + 4 * first_row, counted.data_ptr() + first_row,
        None if by_scale is None else by_scale.data_ptr() + 4 * first_row, torch.get_num_threads(),
    )  # fmt: skip
    native.raise_on(error, "contrast")


def pack(features: Tensor, strides: Strides, order: Tensor, live: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`pack` of a map [B, D, *S] whose memory is dense."""
    rows, channels = order.numel(), features.shape[1]
    packed, inverse_norm = features.new_empty(rows, channels), features.new_empty(rows)
    error = _library().hpcloss_pack(
        features.data_ptr(), ctypes.addressof(_map(features.shape, strides)), order.data_ptr(),
        native.TYPES[order.dtype], rows, live, normalize, packed.data_ptr(), inverse_norm.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    native.raise_on(error, "pack")
    return packed, inverse_norm


def unpack(
    grad: Tensor, packed: Tensor, inverse_norm: Tensor, order: Tensor, normalize: bool, strides: Strides, into: Tensor
) -> None:
    """Write the gradient of a map [B, D, *S], each of whose pixels the order names once."""
    error = _library().hpcloss_unpack(
        grad.data_ptr(), packed.data_ptr(), inverse_norm.data_ptr(), ctypes.addressof(_map(into.shape, strides)),
        order.data_ptr(), native.TYPES[order.dtype], order.numel(), normalize, into.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    native.raise_on(error, "unpack")


@functools.lru_cache(maxsize=64)
def _map(shape: tuple[int, ...], strides: Strides) -> Map:
    images, channels, *spatial = shape
    return Map(images, math.prod(spatial), channels, *strides)


def add_transpose(slopes: Tensor, factor: Tensor, both: Tensor) -> None:
    """both <- slopes_ij factor_i + slopes_ji factor_j [n, n]; contiguous CPU tensors, fp32."""
    pointers = slopes.data_ptr(), slopes.shape[0], factor.data_ptr(), both.data_ptr(), torch.get_num_threads()
    native.raise_on(_library().hpcloss_add_transpose(*pointers), "add_transpose")
