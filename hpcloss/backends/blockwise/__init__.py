"""The PyTorch tiles: any device, float32 and float64; half precision is computed in fp32."""

from hpcloss.backends.blockwise.one_positive import one_positive, one_positive_backward
from hpcloss.backends.blockwise.pair_cross_entropy import pair_cross_entropy, pair_cross_entropy_backward
from hpcloss.backends.blockwise.pair_lse import pair_lse, pair_lse_backward, pair_lse_both, pair_lse_both_backward
from hpcloss.backends.blockwise.pair_mean import pair_mean, pair_mean_backward
from hpcloss.backends.blockwise.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.blockwise.segment_mean import segment_mean

__all__ = [
    "one_positive",
    "one_positive_backward",
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
