"""`segment_mean`: means of consecutive rows, for example the prototypes of the classes of a partition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.operators import differentiable_once, ops, register, register_on_backends, statistics_dtype
from hpcloss.primitives.rows import Rows


def segment_mean(rows: Rows, offsets: Tensor) -> Tensor:
    """Means of consecutive rows.

        mean_s = 1/n_s Σ rows[offsets_s : offsets_{s+1}],      n_s the number of these rows

    The result is differentiable with respect to the rows.

    Args:
        rows: Packed rows `[N, D]`.
        offsets: Ascending row numbers `[S + 1]`, int32 or int64. Rows before the first and from the last on are in no
            segment.

    Returns:
        `[S, D]`, fp32 (float64 for float64 rows). An empty segment gives zeros.

    Examples:
        >>> import torch
        >>> from hpcloss.primitives.rows import pack
        >>> from hpcloss.primitives.segment_mean import segment_mean
        >>> rows = pack(torch.tensor([[1.0], [3.0], [5.0]]), torch.arange(3), normalize=False)
        >>> segment_mean(rows, torch.tensor([0, 2, 3])).tolist()
        [[2.0], [5.0]]
    """
    return _SegmentMean.apply(rows.data, rows.companion, offsets, rows.backend)


class _SegmentMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor, companion: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_rows = data.shape[0]
        return ops.segment_mean(data, offsets, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return None, ops.segment_mean_backward(grad, offsets, ctx.num_rows), None, None


def _fake_segment_mean(rows: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return rows.new_empty((offsets.numel() - 1, rows.shape[1]), dtype=statistics_dtype(rows.dtype))


def _backward(grad: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """d row_i = grad_s / n_s in its segment s, 0 outside: a gather, the same on every backend."""
    per_row = grad / offsets.diff().clamp(min=1)[:, None]
    per_row = torch.nn.functional.pad(per_row, (0, 0, 0, 1))  # a last segment for the rows outside all segments
    rows = torch.arange(num_rows, dtype=offsets.dtype, device=offsets.device)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    return per_row.index_select(0, torch.where(rows < offsets[0], offsets.numel() - 1, segment))


def _fake_backward(grad: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty((num_rows, grad.shape[1]))


register_on_backends("segment_mean", "(Tensor rows, Tensor offsets, str backend) -> Tensor", _fake_segment_mean)
register(
    "segment_mean_backward",
    "(Tensor grad, Tensor offsets, SymInt num_rows) -> Tensor",
    _backward,
    _fake_backward,
)
