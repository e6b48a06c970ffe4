"""Arithmetic of the PyTorch backends: rows in the dtype of the computation, and an operator's gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.operators import statistics_dtype

INF = float("inf")
LOG2E = math.log2(math.e)  # exp2 takes a third of the time of exp
LN2 = math.log(2)


def accumulation(anchors: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype of the computation: fp32, or float64 for float64 rows."""
    dtype = statistics_dtype(anchors.dtype)
    return cast(anchors, dtype), None if keys is None else cast(keys, dtype)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype. `to` takes microseconds even if the dtype is right already."""
    return values if values.dtype == dtype else values.to(dtype)


def gradients(
    anchors: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None, d_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator's results. A gradient that is not needed is an empty tensor of its own."""
    return (
        anchors.new_empty(0) if d_anchors is None else d_anchors,
        anchors.new_empty(0) if d_keys is None else d_keys,
        d_scale,
    )


def gradients_of_logits(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
    needs_anchors: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator's results from the rows' gradients d for slopes by scale * S. They are overwritten.

    keys None: self-contrast, where d_keys is d_anchors.
    """
    d_scale = anchors.new_zeros(())
    if d_anchors is not None:
        if needs_scale:
            # Logits depend on the scale as on the anchors' length. In self-contrast d holds both sides of each pair.
            d_scale = (anchors * d_anchors).sum() / (2 if keys is None else 1)
        d_anchors *= scale
    if keys is not None and d_keys is not None:
        d_keys *= scale
    return gradients(anchors, d_anchors if needs_anchors else None, None if keys is None else d_keys, d_scale)


def finite_mass(mass: Tensor) -> Tensor:
    """The mass with inf in place of -inf, so that exp(. - mass) is 0 for an empty set."""
    return torch.where(mass == -INF, INF, mass)
