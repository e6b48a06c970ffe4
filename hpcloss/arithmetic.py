"""Arithmetic that recipes and backends share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exactly. torch's default threshold of 20 is off by 2e-9. Above 40 it is x, in float64 too."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp with gradient 0 instead of NaN where both are -inf."""
    empty = (a == -math.inf) & (b == -math.inf)
    merged = torch.logaddexp(torch.where(empty, 0.0, a), torch.where(empty, 0.0, b))
    return torch.where(empty, -math.inf, merged)
