"""The base class of the loss modules. They hold options and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hpcloss.losses.options import check_each, check_together


class Loss(nn.Module):
    """Base class of the loss modules. It keeps options as attributes; `options` hands them to the function of the loss.

    An option is checked when it is set. Options that depend on each other are checked when they are used, so they can
    be set one after the other. `forward` then calls the unchecked function.

    Args:
        function: The function of the loss.
        **options: Its options. A tensor becomes a buffer; a parameter stays one.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        super().__init__()
        self._function = function.__name__
        options = check_each(self._function, options)
        check_together(self._function, options)
        for name, value in options.items():
            # A tensor (a learnable temperature is a Parameter) moves and is saved with the module.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                super().__setattr__(name, value)
        self._names = tuple(options)  # from here on __setattr__ checks these names

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_names", ()):
            value = check_each(self._function, {name: value})[name]
        super().__setattr__(name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options as the function of the loss takes them. ValueError if they exclude each other."""
        options = self._options()
        check_together(self._function, options)
        return options

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())
