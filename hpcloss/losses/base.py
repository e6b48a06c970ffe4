"""What the loss modules share: they hold hyper-parameters and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hpcloss.checks import check_options


class Loss(nn.Module):
    """Keeps hyper-parameters as attributes of the same names; `options` hands them to the function of the loss."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        super().__init__()
        check_options(function, options)
        self._names = tuple(options)
        for name, value in options.items():
            # A tensor (a learnable temperature is a Parameter) moves and is saved with the module.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
