"""What similarities are multiplied by: the inverse temperature, and a bound of the logits where one is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.operators import statistics_dtype
from hpcloss.primitives.rows import Rows


class Scale(NamedTuple):
    """The factor of similarities in a logit.

    value: 0-dim tensor in the statistics' dtype, differentiable. bound: a number that |value * similarity| cannot
    exceed, or None. A bound is known only where rows are normalised and the temperature is a number. It chooses a
    faster sum of the same value.
    """

    value: Tensor
    bound: float | None = None

    @staticmethod
    def of(temperature: float | Tensor, rows: Rows, normalize: bool) -> Scale:
        """1 / temperature for these rows; normalize: they are of unit length."""
        dtype, device = statistics_dtype(rows.data.dtype), rows.data.device
        if isinstance(temperature, Tensor):
            return Scale(temperature.to(device=device, dtype=dtype).reshape(()).reciprocal())
        inverse = 1.0 / temperature
        return Scale(torch.full((), inverse, dtype=dtype, device=device), inverse if normalize else None)

    def times(self, factor: float) -> Scale:
        """The scale of logits multiplied by a factor."""
        return Scale(factor * self.value, None if self.bound is None else abs(factor) * self.bound)

    def raised(self, by: float) -> Scale:
        """The same scale for logits whose log-sum-exps may exceed those of their keys `by` so much."""
        return Scale(self.value, None if self.bound is None else self.bound + by)

    def unbounded(self) -> Scale:
        """The same scale, of which no bound is known."""
        return Scale(self.value)
