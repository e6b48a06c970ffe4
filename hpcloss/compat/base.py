"""Base class and checks of the losses under other libraries' signatures."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hpcloss.losses.options import of_pairs
from hpcloss.losses.options import temperature as rule_of_temperature


class PeerLoss(nn.Module):
    """A loss under another library's signature.

    Setting an attribute of the library's class that has no effect here raises AttributeError.
    """

    lacks: tuple[str, ...] = ()  # attributes of the library's class that have no effect here

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.lacks:
            raise AttributeError(f"{name} has no effect on this {type(self).__name__} and cannot be set, got {value!r}")
        super().__setattr__(name, value)


def check_vector_options(temperature: float | Tensor, reduction: str = "mean") -> None:
    """Raise TypeError or ValueError for an invalid temperature or reduction."""
    rule_of_temperature("temperature", temperature)
    of_pairs("reduction", reduction)


def times(loss: Tensor, factor: float | Tensor) -> Tensor:
    """loss * factor, with the dtype and shape of the loss."""
    return loss * (factor.to(loss).reshape(()) if isinstance(factor, Tensor) else factor)
