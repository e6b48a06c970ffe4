"""What the losses of this package share: no attribute of the library's class is set here in silence."""

from __future__ import annotations

from typing import Any

from torch import nn


class PeerLoss(nn.Module):
    """A loss under another library's signature."""

    lacks: tuple[str, ...] = ()  # attributes of the library's class that nothing here reads

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.lacks:
            raise AttributeError(f"{name} has no effect on this {type(self).__name__} and cannot be set, got {value!r}")
        super().__setattr__(name, value)
