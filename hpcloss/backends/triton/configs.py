"""Tile shapes by part (matrix unit and shared memory), precision and width of a row.

They are chosen so that nothing spills (`tests/compiled/test_budgets_*.py`). `python benchmarks/tune.py` searches them
by time on a GPU.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
import triton

from hpcloss.backends.triton.probe import interpreted


class Config(NamedTuple):
    """Rows of a block, columns of a tile, and launch options of a program. maxnreg: the most registers of a thread."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


INTERPRETED = Config(16, 16, 4, 1)  # small, so that small inputs make many tiles
SMALLEST = "turing"  # for an unknown part
# Older compilers leave out the fence between a tile's asynchronous copy and its product (DESIGN.md). On these parts
# results changed from run to run. With one stage there is no such copy.
FENCES_SINCE, NEED_FENCES = (3, 7, 1), ("blackwell",)
WIDTHS = (64, 128, 256, 512)
# Kernels that use the shapes of another kernel, unless a part names their own.
SAME_AS = {
    "pair_cross_entropy": "pair_mean",
    "cross_entropy_backward": "backward",
    # Weights take more registers.
    "weighted_cross_entropy": "pair_cross_entropy",
    "weighted_backward": "backward",
    "weighted_cross_entropy_backward": "cross_entropy_backward",
}

# Products on the multiply-add units, on any part. Their operands fill the registers.
EXACT = {
    "pair_lse": (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
    "pair_mean": (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
    "pair_cross_entropy": (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
    "backward": (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
}
# Turing has no matrix instructions in Triton and 64 KB of shared memory.
TURING = {
    "pair_lse": (Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    "pair_mean": (Config(32, 32, 4, 2), Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    "pair_cross_entropy": (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    "backward": (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}
# AMD parts have 64 KB too, and waves of 64 lanes. The registers of eight waves would not hold a backward program.
AMD = {kernel: tuple(shape._replace(num_warps=4) for shape in shapes) for kernel, shapes in TURING.items()}
# [part][precision][kernel]: one shape for each of WIDTHS.
CONFIGS: dict[str, dict[str, dict[str, tuple[Config, ...]]]] = {
    # Programs small enough for two or three at a time: one computes while another waits for its tiles or products.
    "hopper": {
        "half": {
            "pair_lse": (
                Config(128, 64, 8, 3, 128),
                Config(128, 64, 8, 3, 128),
                Config(128, 64, 8, 2),
                Config(128, 32, 8, 2),
            ),
            "pair_mean": (Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
            "pair_cross_entropy": (
                Config(128, 64, 8, 3, 128),
                Config(128, 64, 8, 3, 128),
                Config(128, 64, 8, 2),
                Config(128, 32, 8, 2),
            ),
            "weighted_cross_entropy": (
                Config(128, 32, 8, 3, 128),
                Config(128, 32, 8, 3, 128),
                Config(128, 64, 8, 2),
                Config(128, 32, 8, 2),
            ),
            "backward": (Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
            "cross_entropy_backward": (
                Config(64, 64, 4, 3),
                Config(64, 64, 4, 3),
                Config(128, 32, 8, 2),
                Config(64, 16, 8, 2),
            ),
            "weighted_backward": (
                Config(64, 32, 4, 3),
                Config(64, 32, 4, 3),
                Config(128, 32, 8, 2),
                Config(64, 32, 8, 2),
            ),
            "weighted_cross_entropy_backward": (
                Config(64, 32, 4, 3),
                Config(64, 32, 4, 3),
                Config(128, 32, 8, 2),
                Config(64, 16, 8, 2),
            ),
        },
        "tf32": {
            "pair_lse": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 4, 2)),
            "pair_mean": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 4, 2)),
            "backward": (Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 1)),
        },
        "ieee": EXACT,
    },
    "ampere": {
        "half": {
            "pair_lse": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
            "pair_mean": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 32, 4, 2)),
            "backward": (
                Config(128, 64, 8, 2, 255),
                Config(128, 32, 8, 2),
                Config(64, 32, 8, 2, 255),
                Config(32, 32, 8, 2),
            ),
            "pair_cross_entropy": (
                Config(128, 64, 8, 3),
                Config(128, 64, 8, 3),
                Config(64, 64, 8, 3),
                Config(32, 32, 8, 2),
            ),
            "cross_entropy_backward": (
                Config(64, 32, 4, 2),
                Config(64, 32, 4, 2),
                Config(64, 64, 8, 2),
                Config(32, 32, 8, 2),
            ),
        },
        "tf32": {
            "pair_lse": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1)),
            "pair_mean": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 1)),
            "backward": (Config(32, 32, 4, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)),
        },
        "ieee": EXACT,
    },
    "consumer": {
        "half": {
            "pair_lse": (Config(64, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
            "pair_mean": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2), Config(32, 32, 4, 1)),
            "backward": (Config(128, 64, 8, 2, 255), Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 4, 1)),
            "pair_cross_entropy": (
                Config(128, 64, 8, 3),
                Config(128, 64, 8, 3),
                Config(64, 32, 8, 2),
                Config(32, 32, 4, 1),
            ),
            "cross_entropy_backward": (
                Config(64, 32, 4, 2),
                Config(64, 32, 4, 2),
                Config(64, 32, 8, 2),
                Config(32, 16, 4, 1),
            ),
        },
        "tf32": {
            "pair_lse": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(16, 16, 4, 1)),
            "pair_mean": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(16, 16, 4, 1)),
            "backward": (Config(32, 32, 4, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)),
        },
        "ieee": EXACT,
    },
    "blackwell": {
        "half": {
            "pair_lse": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
            "pair_mean": (
                Config(128, 32, 8, 3, 255),
                Config(128, 32, 8, 3, 255),
                Config(128, 32, 8, 3),
                Config(128, 32, 8, 2),
            ),
            "backward": (Config(128, 32, 8, 2), Config(64, 32, 8, 2, 255), Config(64, 32, 8, 2), Config(32, 64, 8, 1)),
            "pair_cross_entropy": (
                Config(128, 64, 8, 3),
                Config(128, 32, 8, 2),
                Config(128, 64, 8, 3),
                Config(128, 32, 8, 2),
            ),
            "cross_entropy_backward": (
                Config(128, 32, 8, 2),
                Config(128, 32, 8, 1),
                Config(64, 32, 8, 2),
                Config(32, 64, 8, 1),
            ),
        },
        "tf32": {
            "pair_lse": (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 4, 2)),
            "pair_mean": (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 4, 2)),
            "backward": (Config(64, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 1)),
        },
        "ieee": EXACT,
    },
    "turing": {"half": TURING, "tf32": TURING, "ieee": TURING},
    "amd": {"half": AMD, "tf32": AMD, "ieee": AMD},
}


def capability(device: torch.device) -> int:
    """Compute capability as one number, such as 90; 0 for AMD parts, whose numbers have another meaning."""
    if torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def part(capability: int) -> str:
    """The part whose tile shapes a compute capability uses."""
    if capability in (80, 87):
        return "ampere"  # 163 KB of shared memory a block
    if capability in (86, 89, 120, 121):
        return "consumer"  # 99 KB
    return {0: "amd", 90: "hopper", 100: "blackwell", 103: "blackwell"}.get(capability, SMALLEST)


def blocks_of(count: int, size: int) -> int:
    """Number of blocks of a size that hold so many rows. Triton's own functions for it take the host 2 us a call."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count` (from 1)."""
    return 1 << (count - 1).bit_length()


def precision(rows: torch.Tensor) -> str:
    """Precision of the products of these rows: "half", or for fp32 rows "tf32" or "ieee" (exact, without matrix units).

    It follows torch's own setting, `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.fp32_precision`.
    """
    if rows.dtype != torch.float32:
        return "half"
    setting = torch.backends.cuda.matmul
    # The function of the older setting raises if the newer one was used.
    allowed = setting.fp32_precision == "tf32" if hasattr(setting, "fp32_precision") else setting.allow_tf32
    return "tf32" if allowed and not interpreted() and capability(rows.device) >= 80 else "ieee"


def config(kernel: str, rows: torch.Tensor) -> Config:
    """The tile shape of a kernel ("pair_lse", "pair_mean", "backward", one of SAME_AS) for rows [N, D]."""
    if interpreted():
        return INTERPRETED
    width = max(power_of_2(rows.shape[1]), WIDTHS[0])
    here = part(capability(rows.device))
    shapes = CONFIGS[here][precision(rows)]
    while kernel not in shapes:
        kernel = SAME_AS[kernel]
    chosen = shapes[kernel][WIDTHS.index(width)]
    return chosen._replace(num_stages=1) if here in NEED_FENCES and lacks_fences(triton.__version__) else chosen


@functools.cache
def lacks_fences(version: str) -> bool:
    """Whether this version of the compiler leaves out the fence that NEED_FENCES describes."""
    return tuple(int(re.match(r"\d*", number)[0] or 0) for number in version.split(".")[:3]) < FENCES_SINCE
