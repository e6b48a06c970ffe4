"""The Triton backend: fused, streaming kernels on NVIDIA GPUs, with fp16, bf16 or fp32 rows and fp32 statistics.

Each function is beside the kernels that it launches. Callers check shapes and pointers; nothing here does.
"""

from hpcloss.backends.triton.pair_cross_entropy import pair_cross_entropy, pair_cross_entropy_backward
from hpcloss.backends.triton.pair_lse import pair_lse, pair_lse_backward, pair_lse_both, pair_lse_both_backward
from hpcloss.backends.triton.pair_mean import pair_mean, pair_mean_backward
from hpcloss.backends.triton.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.triton.segment_mean import segment_mean

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
