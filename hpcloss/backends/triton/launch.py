"""How kernels are started: on their tensors' device, with the arithmetic that all of them assume."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def run(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Start `programs` programs of a kernel on the device of `like`; options: its constants, num_warps, num_stages."""
    if programs == 0:
        return
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        # Named because its default is about to change: multiply-adds stay fused.
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)


def int32(indices: list[Tensor]) -> list[Tensor]:
    """Row numbers as kernels read them."""
    return [index.to(torch.int32).contiguous() for index in indices]
