"""How operators enter torch: a schema of plain tensors, one Python body, one fake; autograd is their callers' work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def register(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.hpcloss.<name>`. The body runs with autocast off, as it chooses its own precision."""

    @functools.wraps(body)
    def without_autocast(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return body(*args)

    torch.library.define(f"hpcloss::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"hpcloss::{name}", "default", without_autocast)
    torch.library.register_fake(f"hpcloss::{name}", fake)
