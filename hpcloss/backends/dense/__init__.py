"""The dense backend: all similarities of a region at once, for problems whose similarities fit in 4 MB.

Each pass takes a few PyTorch operations, in float32 and float64. Rows are packed as for the tiles.
"""

from hpcloss.backends.blockwise.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.blockwise.segment_mean import segment_mean
from hpcloss.backends.dense.one_positive import one_positive, one_positive_backward
from hpcloss.backends.dense.pair_contrast import pair_contrast, pair_contrast_backward
from hpcloss.backends.dense.pair_cross_entropy import pair_cross_entropy, pair_cross_entropy_backward
from hpcloss.backends.dense.pair_lse import pair_lse, pair_lse_backward, pair_lse_both, pair_lse_both_backward
from hpcloss.backends.dense.pair_mean import pair_mean, pair_mean_backward

__all__ = [
    "one_positive",
    "one_positive_backward",
    "pack",
    "pack_backward",
    "pair_contrast",
    "pair_contrast_backward",
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
