"""What serves where Triton does not: the dense backend or the tiles, by the size of each call.

Rows are packed once, before anybody knows how many keys they will meet. So `auto` decides here, call by call.
"""

from __future__ import annotations

import torch

from hpcloss.backends.blockwise.rows import pack, pack_backward, rows_dtype
from hpcloss.backends.blockwise.segment_mean import segment_mean
from hpcloss.backends.dense.batches import MOST, largest_region
from hpcloss.plan.partition import Intervals

__all__ = ["choose", "check_dense", "pack", "pack_backward", "rows_dtype", "segment_mean"]

# Pairs of the largest region, up to which `dense` takes less time than the tiles.
DENSE_UP_TO = {"cpu": 1 << 18, "mps": MOST}
DENSE_ELSEWHERE = 1 << 20  # one tile there, with the same mask


def choose(at: Intervals, num_keys: int) -> str:
    """The backend of a call, "dense" or "blockwise"."""
    device = at.pos_start.device.type
    return "dense" if _pairs(at, num_keys) <= DENSE_UP_TO.get(device, DENSE_ELSEWHERE) else "blockwise"


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
    readable = at.pos_start.device.type == "cpu" and not torch.compiler.is_compiling()
    return largest_region(at) if readable and at.key_end.numel() > 1 else all_pairs
