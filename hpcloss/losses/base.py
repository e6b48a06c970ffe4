"""What the loss modules share: they hold hyper-parameters and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn


class Loss(nn.Module):
    """Keeps hyper-parameters as attributes of the same names; `options` hands them to the function of the loss."""

    def __init__(self, **options: Any):
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
