"""What serves where Triton does not: the dense backend or the tiles, by the size of each call.

Rows are packed once, before anybody knows how many keys they will meet. So `auto` decides here, call by call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.blockwise.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.blockwise.segment_mean import segment_mean
from hpcloss.backends.dense.batches import MOST, Region, largest_region, regions_of
from hpcloss.plan import native
from hpcloss.plan.partition import Intervals

__all__ = [
    "check_dense",
    "choose",
    "kept_slopes",
    "pack",
    "pack_backward",
    "rows_dtype",
    "segment_mean",
    "takes_pieces",
]

# Pairs of the largest region, up to which `dense` takes less time than the tiles.
DENSE_UP_TO = {"cpu": 1 << 19, "mps": MOST}
DENSE_ELSEWHERE = 1 << 20  # one tile there, with the same mask


def choose(at: Intervals, num_keys: int, in_pieces: bool = False) -> str:
    """The backend of a call: "dense", or beyond its size "pieces", where these serve, else "blockwise"."""
    if torch.compiler.is_compiling():
        return "blockwise"  # else compiled code would be for sizes below the limit alone, or above it
    limit = DENSE_UP_TO.get(at.pos_start.device.type, DENSE_ELSEWHERE)
    if _pairs(at, num_keys) <= limit:
        return "dense"
    return "pieces" if in_pieces else "blockwise"


def takes_pieces(anchors: Tensor) -> bool:
    """Whether a contrast of these anchors and other keys may run in pieces."""
    return anchors.dtype == torch.float32 and anchors.device.type == "cpu" and _has_library()


def _has_library() -> bool:
    return not native.why_not("cpu")


# What `torch.compiler.assume_constant_result` sets; calling it would import the compiler, and Triton, at once.
_has_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kept_slopes(at: Intervals, num_keys: int) -> int:
    """The number of slopes that the dense backend keeps for backward: of all regions, or none.

    While a graph is traced, no sizes of regions are known but that of one region.
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
    """Pairs that the dense backend holds at once: of the largest region where sizes can be read, else of all rows."""
    all_pairs = at.pos_start.numel() * num_keys
    return largest_region(at) if at.key_end.numel() > 1 and _is_read(at) else all_pairs


def _is_read(at: Intervals) -> bool:
    """Whether the host reads the bounds of regions: on the CPU, of tensors that hold values. Fake ones hold none."""
    bound = at.pos_start
    return bound.device.type == "cpu" and not torch.compiler.is_compiling() and type(bound) is Tensor
