"""Launching of kernels: on their tensors' device, with the arithmetic that all of them assume."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcloss.backends.triton import configs

ROWS = 1024  # rows of a program that works row by row


def run(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel on the device of `like`. options: its constants, num_warps, num_stages."""
    if programs == 0:
        return
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        # Set explicitly, because Triton's default will change: multiply-adds stay fused.
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)


def row_by_row(kernel: Any, like: Tensor, *args: Any, **constants: Any) -> None:
    """Run one program for each ROWS entries of `like`."""
    run(kernel, configs.blocks_of(like.numel(), ROWS), like, *args, **constants, BLOCK=ROWS)


class Tiling(NamedTuple):
    """How rows are cut into blocks of one program each."""

    programs: int
    constants: dict[str, Any]  # of the kernel, and the launch options


def tiling(shape: str, rows: Tensor) -> Tiling:
    """Blocks of `rows` [N, D] in the tile shape of this name (`configs.config`)."""
    tiles = configs.config(shape, rows)
    # Half precision has no input precision.
    constants = _constants(tiles, rows.shape[1], "tf32" if configs.precision(rows) == "tf32" else "ieee")
    return Tiling(configs.blocks_of(rows.shape[0], tiles.block_i), constants)


@functools.cache
def _constants(tiles: configs.Config, channels: int, precision: str) -> dict[str, Any]:
    constants = {
        "D": channels,
        "BLOCK_I": tiles.block_i,
        "BLOCK_J": tiles.block_j,
        "BLOCK_D": max(configs.power_of_2(channels), 16),
        "PRECISION": precision,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return constants if tiles.maxnreg is None else {**constants, "maxnreg": tiles.maxnreg}


def int32(indices: list[Tensor]) -> list[Tensor]:
    """Row numbers in the dtype of the kernels."""
    return [_as(index, torch.int32) for index in indices]


def fp32(values: Any) -> Any:
    """Row vectors and scalars in the dtype of the kernels. None stays None."""
    return None if values is None else _as(values, torch.float32)


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, contiguous and in a dtype. Both conversions take microseconds even if there is nothing to do."""
    return values if values.dtype == dtype and values.is_contiguous() else values.to(dtype).contiguous()


def as_anchors(anchors: Tensor, keys: Tensor | None) -> Tensor:
    """The keys in the anchors' dtype: a matrix unit multiplies equal dtypes (fp16 views and an fp32 memory bank)."""
    if keys is None:
        return anchors
    return keys if keys.dtype == anchors.dtype else keys.to(anchors.dtype)
