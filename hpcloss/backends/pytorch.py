"""The choice between the dense backend and the tiles, by the size of each call.

Rows are packed once, before the number of their keys is known. So the choice is made here, call by call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.blockwise.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.blockwise.segment_mean import segment_mean
from hpcloss.backends.dense.batches import MOST, Region, largest_region, regions_of
from hpcloss.backends.dense.rows import is_native
from hpcloss.plan.partition import Intervals

__all__ = [
    "check_dense",
    "choose",
    "kept_slopes",
    "pack",
    "pack_backward",
    "rows_dtype",
    "segment_mean",
]

# Pairs of the largest region up to which the dense backend is not slower than the tiles. Its time over theirs, for
# rows of one region in fp32, and in float64 where that differs (`python benchmarks/choice.py`, CPU, one thread):
#
#                       128   256   384   512   724  1,024 rows
# contrast             0.36  0.40  0.43  0.60  0.75   0.84       float64: 0.67 at 384, 0.88 at 512, 1.80 at 724
# one_positive         0.52  0.58  0.63  0.65  0.73   0.84       float64: 0.94 at 724, 1.61 at 1,024
# pair_lse             0.62  0.67  0.70  1.00  1.56   1.76
# pair_cross_entropy   0.66  0.72  0.74  0.92  1.12   1.60
# pair_mean            0.83  0.94  0.96  1.72  2.77   5.83
DENSE_UP_TO = {"contrast": 1 << 20, "one_positive": 1 << 19}
DENSE_OTHERS = 1 << 17  # other primitives, and a contrast without the C++ library
DENSE_ELSEWHERE = 1 << 20  # not measured; on other devices such a call is one tile with the same mask


def choose(primitive: str, anchors: Tensor, keys: Tensor | None, at: Intervals) -> str:
    """The backend of a call: "dense"; beyond its size "pieces", if it can run; otherwise "blockwise"."""
    if torch.compiler.is_compiling():
        return "blockwise"  # otherwise compiled code would hold only below or above the limit
    whole_rows = primitive == "contrast" and is_native(anchors)
    limit = DENSE_ELSEWHERE
    if anchors.device.type == "cpu":
        limit = DENSE_OTHERS if primitive == "contrast" and not whole_rows else DENSE_UP_TO.get(primitive, DENSE_OTHERS)
    if _pairs(at, (anchors if keys is None else keys).shape[0]) <= limit:
        return "dense"
    return "pieces" if whole_rows and keys is not None else "blockwise"


def kept_slopes(at: Intervals, num_keys: int) -> int:
    """The number of slopes that the dense backend keeps for backward: all, or none.

    While a graph is traced, the sizes of regions are unknown unless there is one region.
    """
    if at.key_end.numel() == 1:
        return at.pos_start.numel() * num_keys
    if not _is_read(at):
        return 0
    count = sum([n * m for n, m in map(Region.shape, regions_of(at))])
    return count if count <= MOST else 0


def check_dense(at: Intervals, num_keys: int) -> None:
    """Raise NotImplementedError for a call that is too large for the dense backend."""
    pairs = _pairs(at, num_keys)
    if pairs > MOST:
        raise NotImplementedError(
            f"backend 'dense' cannot run this call: a region may have at most {MOST} pairs of an anchor and a key,"
            f" got {pairs}"
        )


def _pairs(at: Intervals, num_keys: int) -> int:
    """Pairs that the dense backend holds at once: of the largest region if sizes can be read, otherwise of all rows."""
    all_pairs = at.pos_start.numel() * num_keys
    return largest_region(at) if at.key_end.numel() > 1 and _is_read(at) else all_pairs


def _is_read(at: Intervals) -> bool:
    """Whether the host reads the bounds of regions: on the CPU, of tensors that hold values. Fake tensors hold none."""
    bound = at.pos_start
    return bound.device.type == "cpu" and not torch.compiler.is_compiling() and type(bound) is Tensor
