"""The PyTorch backend: any device, float32 and float64, where half precision is computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.blockwise.pair_cross_entropy import pair_cross_entropy, pair_cross_entropy_backward
from hpcloss.backends.blockwise.pair_lse import pair_lse, pair_lse_backward, pair_lse_both, pair_lse_both_backward
from hpcloss.backends.blockwise.pair_mean import pair_mean, pair_mean_backward
from hpcloss.backends.blockwise.rows import pack, pack_backward
from hpcloss.backends.blockwise.segments import segment_mean
from hpcloss.operators import statistics_dtype

__all__ = [
    "pack",
    "pack_backward",
    "pair_cross_entropy",
    "pair_cross_entropy_backward",
    "pair_lse",
    "pair_lse_backward",
    "pair_lse_both",
    "pair_lse_both_backward",
    "pair_mean",
    "pair_mean_backward",
    "rows_dtype",
    "segment_mean",
]


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """Dtype in which features are packed for this backend."""
    return statistics_dtype(features.dtype)
