"""Checks of arguments: single values, and shapes and dtypes of tensors. Errors name the argument and its value.

Values of tensors are checked only where the check does not wait for a device, or where the caller asks for it.
`hpcloss.plan.labels` checks labels, and `hpcloss.losses.options` the options of the losses.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import plain

Rule = Callable[[str, Any], Any]


# ---- rules of one value: they take its name and the value, return it, and raise TypeError or ValueError with both


def number(name: str, value: Any) -> float:
    """A real number. Neither a bool, nor a string as in configuration files."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        if not isinstance(value, (str, bytes)) and not _is_bool(value):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def boolean(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (str(getattr(value, "dtype", "")) == "bool" and value.shape == ())


def number_that(holds: Callable[[float], bool], words: str) -> Rule:
    """The rule of numbers for which `holds` is true. words: the range, for the message."""

    def rule(name: str, value: Any) -> float:
        """A number of the range that its message names."""
        found = number(name, value)
        if not holds(found):
            raise ValueError(f"{name} must be {words}, got {value}")
        return found

    return rule


positive = number_that(lambda x: 0 < x < math.inf, "positive")
finite = number_that(lambda x: -math.inf < x < math.inf, "a finite number")
at_least_zero = number_that(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
below_one = number_that(lambda x: 0 <= x < 1, "in [0, 1)")


def one_of(*choices: str) -> Rule:
    """The rule of one word of several."""

    def rule(name: str, value: Any) -> str:
        """One of the words that its message names."""
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value

    return rule


backend_name = one_of("auto", "dense", "blockwise", "triton")


def or_none(other: Rule) -> Rule:
    """The rule that also allows None."""
    return lambda name, value: None if value is None else other(name, value)


def integers(name: str, value: Any) -> tuple[int, ...]:
    """One or several 64-bit integers, as a tuple."""
    found = _integers_of(name, value)
    if not all([-(2**63) <= one < 2**63 for one in found]):
        raise ValueError(f"{name} must fit in int64, got {value!r}")
    return found


def _integers_of(name: str, value: Any) -> tuple[int, ...]:
    # Plain integers first, because older torch cannot trace the rest.
    if _is_integer(value):
        return (value,)
    if isinstance(value, (tuple, list)) and all([_is_integer(one) for one in value]):
        return tuple(value)
    try:
        return (_index(value),)
    except TypeError:
        pass
    try:
        if not isinstance(value, (str, bytes)):  # bytes are integers, one by one
            return tuple([_index(one) for one in value])
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _index(value: Any) -> int:
    """`operator.index`, with TypeError for a bool."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def count(name: str, value: Any) -> int:
    """An integer of at least 1 and below 2^31."""
    if not _is_integer(value):
        try:
            value = _index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be at least 1{'' if value < 1 else ' and below 2^31'}, got {value}")
    return value


def check_sizes(name: str, size: int | Sequence[int] | None) -> tuple[int, ...]:
    """Cell sizes as a tuple, empty for None. Raises TypeError or ValueError for invalid sizes."""
    sizes = () if size is None else integers(name, size)
    if any([value < 1 for value in sizes]):
        raise ValueError(f"{name} must be at least 1 on every axis, got {size!r}")
    return sizes


# ---- tensors


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_vectors(name: str, vectors: Tensor, like: Tensor | None = None, same_length: bool = False) -> None:
    """Raise TypeError or ValueError unless `vectors` are floating `[N, D]` and fit the argument `like`, if given."""
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vectors).__name__}{_elsewhere(name, None)}")
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {vectors.dtype}{_elsewhere(name, vectors.dim())}")
    if vectors.dim() != 2 or vectors.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D], got {tuple(vectors.shape)}{_elsewhere(name, vectors.dim())}")
    if like is None:
        return
    if vectors.shape[1] != like.shape[1] or (same_length and vectors.shape[0] != like.shape[0]):
        expected = f"[{like.shape[0] if same_length else 'M'}, {like.shape[1]}]"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(vectors.shape)}")
    if vectors.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {vectors.device}")


# The class for a call with another library's arguments: by argument and number of dimensions (None: no tensor).
_ELSEWHERE = {
    ("embeddings", 3): "for views [N, views, D] use hpcloss.compat.supcontrast.SupConLoss",
    ("keys", None): "for the pairs of a miner use hpcloss.compat.pml.SupConLoss",
    ("view2", 1): "for embeddings and labels use hpcloss.compat.pml.NTXentLoss",
    ("negatives", 3): "for negatives of each query use hpcloss.compat.infonce.InfoNCE(negative_mode='paired')",
    ("negatives", 0): "for a logit_scale use hpcloss.compat.open_clip.ClipLoss",
}


def _elsewhere(name: str, dims: int | None) -> str:
    return f"; {_ELSEWHERE[name, dims]}" if (name, dims) in _ELSEWHERE else ""


def check_probs(features: Tensor, probs: Tensor) -> None:
    """Raise TypeError or ValueError unless `probs` are floating [B, C, *S] for features [B, D, *S]."""
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating point, got {probs.dtype}")
    fits = probs.dim() == features.dim() and probs.shape[1] > 0
    if not fits or probs.shape[:1] + probs.shape[2:] != features.shape[:1] + features.shape[2:]:
        raise ValueError(
            f"probs must have shape [B, C, *S] for features {tuple(features.shape)}, got {tuple(probs.shape)}"
        )
    if probs.device != features.device:
        raise ValueError(f"probs must be on {features.device}, got {probs.device}")


def check_same_maps(name: str, features: Tensor, like_name: str, like: Tensor) -> None:
    """Raise TypeError or ValueError unless two feature maps have one shape, dtype and device."""
    if features.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, as {like_name}, got {features.dtype}")
    if features.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, as {like_name}, got {tuple(features.shape)}")
    if features.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as {like_name}, got {features.device}")


def check_used(order: Tensor | None = None, live: Tensor | None = None, **inputs: Tensor | float | None) -> None:
    """Raise ValueError for inf and NaN in the values that a loss reads.

    This synchronises with the device and ends a compiled graph.

    Args:
        order: Pixels or rows that are read, in this order. None: all values of the inputs.
        live: Number of leading elements of `order` that are read. None: all.
        **inputs: `[B, D, *S]` or `[N, D]` by name; without `order` tensors of any shape.
    """
    for name, values in inputs.items():
        if not isinstance(values, Tensor):
            continue
        broken = ~plain(values).detach().isfinite()
        if order is not None:
            used = torch.zeros(values.shape[0], 1, *values.shape[2:], dtype=torch.bool, device=values.device)
            used.view(-1)[order[: None if live is None else int(live)].long()] = True
            broken &= used
        if bool(broken.any()):
            first = tuple(broken.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite where it is used, got {int(broken.sum())} values that are not; the first is"
                f" {plain(values)[first].item()} at {first}"
            )
