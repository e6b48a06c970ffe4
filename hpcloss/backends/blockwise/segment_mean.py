"""Means of segments of rows as PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.operators import statistics_dtype

ROWS = 1 << 12  # rows added at a time in float64


def segment_mean(rows: Tensor, offsets: Tensor) -> Tensor:
    """Means [S, D] of rows offsets[s]:offsets[s + 1]; a zero row for an empty segment."""
    counts = offsets.diff()
    if rows.device.type == "cpu":
        sums = _sums(rows, offsets, counts)
    else:
        # Each segment is added in order: deterministic. `unsafe` skips checks that wait for the device.
        accumulated = rows.to(statistics_dtype(rows.dtype))
        sums = torch.segment_reduce(accumulated, "sum", offsets=offsets, unsafe=True, initial=0.0)
    return (sums / counts.clamp(min=1)[:, None]).to(statistics_dtype(rows.dtype))


def _sums(rows: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """Sums [S, D] in float64, since `index_add_` adds a long segment one row after the other."""
    sums = torch.zeros(counts.numel(), rows.shape[1], dtype=torch.float64)
    segment = torch.repeat_interleave(counts)
    first = int(offsets[0])
    for part, into in zip(rows[first : first + segment.numel()].split(ROWS), segment.split(ROWS)):
        sums.index_add_(0, into, part.double())
    return sums
