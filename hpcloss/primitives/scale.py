"""The factor of similarities in a logit, and a bound of the logits if one is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.operators import statistics_dtype
from hpcloss.primitives.rows import Rows


class Scale(NamedTuple):
    """The factor of similarities in a logit, with a bound of the logits.

    A bound is known if rows are normalised and the temperature is a number. It selects a faster sum with the same
    value.

    Attributes:
        value: The factor, 0-dim, in the dtype of the statistics. It is differentiable.
        bound: A number that |value * similarity| cannot exceed, or None.
    """

    value: Tensor
    bound: float | None = None

    @staticmethod
    def of(temperature: float | Tensor, rows: Rows, normalize: bool) -> Scale:
        """1 / temperature for given rows.

        Args:
            temperature: A positive number, or a tensor with one element (learnable).
            rows: The rows, which give dtype and device.
            normalize: The rows have unit length.
        """
        dtype, device = statistics_dtype(rows.data.dtype), rows.data.device
        if isinstance(temperature, Tensor):
            return Scale(temperature.to(device=device, dtype=dtype).reshape(()).reciprocal())
        inverse = 1.0 / temperature
        return Scale(torch.full((), inverse, dtype=dtype, device=device), inverse if normalize else None)

    def times(self, factor: float) -> Scale:
        """The scale of logits that are multiplied by a number.

        Args:
            factor: The number.
        """
        return Scale(factor * self.value, None if self.bound is None else abs(factor) * self.bound)

    def raised(self, by: float) -> Scale:
        """The same scale with a larger bound: log-sum-exps may exceed those of their keys by so much.

        Args:
            by: The excess.
        """
        return Scale(self.value, None if self.bound is None else self.bound + by)

    def unbounded(self) -> Scale:
        """The same scale without a bound."""
        return Scale(self.value)
