"""The order of the inputs of the pair primitives' autograd functions, and the gradients of these inputs.

Each function takes (anchors, anchors' companion, keys, keys' companion, scale, ...). Rows are not differentiable; their
companions replace them in the graph (`hpcloss.primitives.rows`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpcloss.operators import statistics_dtype
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def inputs(anchors: Rows, keys: Rows | None, scale: Scale) -> tuple[Tensor | None, ...]:
    """The first five inputs. ValueError if anchors and keys are packed for different backends."""
    if keys is None:
        return anchors.data, anchors.companion, None, None, scale.value
    if keys.backend != anchors.backend:
        raise ValueError(f"keys must be packed for backend {anchors.backend!r}, as anchors, got {keys.backend!r}")
    return anchors.data, anchors.companion, keys.data, keys.companion, scale.value


def needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether backward needs gradients of the anchors, the keys and the scale."""
    _, of_anchors, _, of_keys, of_scale, *_ = ctx.needs_input_grad
    return of_anchors, of_keys, of_scale


def of_inputs(ctx: Any, found: tuple[Tensor | None, ...], sixth: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The result of backward: an operator's gradients of anchors, keys and scale, and that of the sixth input."""
    needed = ctx.needs_input_grad
    of_anchors, of_keys, of_scale = [value if needed[place] else None for place, value in zip((1, 3, 4), found)]
    return None, of_anchors, None, of_keys, of_scale, sixth, *(None,) * (len(needed) - 6)


def fake_gradients(
    anchors: Tensor, keys: Tensor | None, needs_anchors: bool, needs_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of an operator's gradients of anchors, keys and scale."""
    dtype = statistics_dtype(anchors.dtype)
    d_anchors = anchors.new_empty(anchors.shape if needs_anchors else (0,), dtype=dtype)
    d_keys = anchors.new_empty(keys.shape if keys is not None and needs_keys else (0,), dtype=dtype)
    return d_anchors, d_keys, anchors.new_empty((), dtype=dtype)


def fake_statistics(anchors: Tensor, number: int) -> tuple[Tensor, ...]:
    """The shape and dtype of so many results [N] of an operator."""
    dtype = statistics_dtype(anchors.dtype)
    return tuple([anchors.new_empty(anchors.shape[:1], dtype=dtype) for _ in range(number)])
