"""When exponentials of similarities need no shift."""

from __future__ import annotations

import math

import torch

# A sum of exp(scale * s) over all keys needs no shift if its logarithm certainly stays between these bounds.
SAFE_EXPONENT = {torch.float32: 87.0, torch.float64: 700.0}


def is_safe(
    count: int, scale_bound: float | None, dtype: torch.dtype, *, twice: bool = False, margin: float = 0.0
) -> bool:
    """Whether exp(scale s) can be summed over `count` keys without a shift.

    twice: the exponential is also multiplied by such a sum. dtype: dtype of the sum. margin: largest size of other
    terms in the exponent.
    """
    if scale_bound is None:
        return False
    return (2 if twice else 1) * scale_bound + margin + math.log(max(count, 1)) <= SAFE_EXPONENT[dtype]
