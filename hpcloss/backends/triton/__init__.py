"""The Triton backend: fused, streaming kernels on NVIDIA GPUs, fp16, bf16 and fp32 rows with fp32 statistics.

Each function launches what the other modules define; shapes and pointers are checked by nobody below this line.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from hpcloss.backends.bounds import is_safe
from hpcloss.backends.triton import pair_lse as lse_kernels
from hpcloss.backends.triton import pair_mean as mean_kernels
from hpcloss.backends.triton.backward import backward_kernel
from hpcloss.backends.triton.configs import Config, config
from hpcloss.backends.triton.probe import interpreted

ROWS = 1024  # of a program that works row by row


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """fp16 for unit rows of half precision (there it is 8 times as exact as bf16), else bf16 for its range."""
    if features.dtype == torch.float32:
        return torch.float32
    if normalize:
        return torch.float16
    # No bf16 in the matrix unit of Turing, nor right in the interpreter.
    return (
        torch.float32 if interpreted() or torch.cuda.get_device_capability(features.device) < (8, 0) else torch.bfloat16
    )


def pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set and where no anchor is."""
    others = anchors if keys is None else keys
    online = bias is not None or not is_safe(others.shape[0], scale_bound, torch.float32)
    lse = torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device)
    at = _intervals(intervals)
    tiles = config("pair_lse", anchors)
    _launch(
        lse_kernels.forward_kernel, lse, tiles,
        anchors, others, bias, scale, lse, *at, lse.numel(), at[3].numel(),
        D=anchors.shape[1], RULE=rule, ONLINE=online, **_tiling(tiles, anchors),
    )  # fmt: skip
    return lse


def pair_lse_backward(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale exp(scale s_ij + bias_j - lse_i), as d anchors, d keys (one sum in self-contrast), d scale."""
    count = (anchors if keys is None else keys).shape[0]
    online = bias is not None or not is_safe(count, scale_bound, torch.float32, twice=True)
    statistics, lift, largest_grad, grad = _statistics(grad, anchors)
    _launch(
        lse_kernels.statistics_kernel, lse, Config(ROWS, 0, 4, 1),
        grad, lse, scale, largest_grad, lift, statistics, lse.numel(), ONLINE=online, BLOCK=ROWS,
    )  # fmt: skip
    return _backward(
        anchors, keys, statistics, lift, bias, scale, None, None, 0.0, intervals,
        dict(SLOPE=lse_kernels.slope, TERM="lse", RULE=rule, ONLINE=online),
        needs_anchors, needs_keys, needs_scale,
    )  # fmt: skip


def pair_mean(
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """out_i = sum_{j in positives(i)} w_ij t_ij, w = softmax over the positives of (-hardness s_ij + log_weight_j).

    Also returns the weights' lse ("mass", -inf for an empty set) and slope_i = d out_i / d stat_i, all [N].
    """
    others = anchors if keys is None else keys
    online = log_weight is not None or not _weights_are_safe(others, scale_bound, hardness)
    out, mass, slope = torch.empty(3, anchors.shape[0], dtype=torch.float32, device=anchors.device)
    at = _intervals(intervals)
    tiles = config("pair_mean", anchors)
    _launch(
        mean_kernels.forward_kernel, out, tiles,
        anchors, others, stat, log_weight, scale, _weighting(hardness, log_weight), discount, out, mass, slope,
        *at, out.numel(), at[3].numel(),
        D=anchors.shape[1], TERM="logit" if stat is None else "own", ONLINE=online, **_tiling(tiles, anchors),
    )  # fmt: skip
    return out, mass, slope


def pair_mean_backward(
    grad: Tensor,
    out: Tensor,
    mass: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    detach_weights: bool,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i w_ij (dt/ds - hardness (t_ij - out_i), the second part unless weights are detached)."""
    others = anchors if keys is None else keys
    pull = None if detach_weights or hardness == 0 else -hardness
    margin = 2 * abs(discount) + abs(hardness)
    safe = is_safe(others.shape[0], scale_bound, torch.float32, twice=True, margin=margin)
    online = log_weight is not None or pull is not None or not safe
    weighting = _weighting(hardness, log_weight)
    term = "logit" if stat is None else "own"
    statistics, lift, largest_grad, grad = _statistics(grad, anchors)
    _launch(
        mean_kernels.statistics_kernel, out, Config(ROWS, 0, 4, 1),
        grad, out, mass, stat, scale, weighting, pull, discount, largest_grad, lift, statistics, out.numel(),
        TERM=term, ONLINE=online, BLOCK=ROWS,
    )  # fmt: skip
    return _backward(
        anchors, keys, statistics, lift, log_weight, scale, weighting, pull, discount, intervals,
        dict(SLOPE=mean_kernels.slope, TERM=term, RULE="positives", ONLINE=online),
        needs_anchors, needs_keys, needs_scale,
    )  # fmt: skip


def _backward(
    anchors: Tensor,
    keys: Tensor | None,
    statistics: Tensor,
    lift: Tensor | None,
    key_bias: Tensor | None,
    scale: Tensor,
    hardness: float | None,
    pull: float | None,
    discount: float,
    intervals: list[Tensor],
    pair: dict[str, Any],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the anchors' statistics: one pass in self-contrast, else one for each side that needs it."""
    *positives, anchor_start, anchor_end, key_start, key_end = _intervals(intervals)
    at_anchors, at_keys = (anchor_start, anchor_end), (key_start, key_end)
    values = (key_bias, scale, hardness, pull, discount, lift)
    tiles = config("backward", anchors)

    def run(own: Tensor, other: Tensor, of_own: Any, of_other: Any, wanted: bool, by_scale: Any, *at: Any) -> Tensor:
        gradient = torch.empty(own.shape if wanted else (0,), dtype=torch.float32, device=own.device)
        _launch(
            backward_kernel, own, tiles,
            own, other, of_own, of_other, *values, gradient if wanted else None, by_scale,
            *positives, *at, own.shape[0], other.shape[0], anchor_start.numel(),
            D=anchors.shape[1], **pair, **_tiling(tiles, anchors),
        )  # fmt: skip
        return gradient

    by_scale = torch.empty_like(statistics[:, 0]) if needs_scale else None
    if keys is None:
        # Here every row of a region is a key, and meets its region.
        d_anchors = run(
            anchors, anchors, statistics, statistics, needs_anchors, by_scale, *at_keys, *at_keys, *at_anchors
        )
        d_keys = d_anchors.new_empty(0)
    else:
        d_anchors = d_keys = torch.empty(0, dtype=torch.float32, device=anchors.device)
        if needs_anchors or needs_scale:
            d_anchors = run(anchors, keys, statistics, None, needs_anchors, by_scale, *at_anchors, *at_keys, None, None)
        if needs_keys:
            d_keys = run(keys, anchors, None, statistics, True, None, *at_keys, *at_anchors, None, None)
        else:
            d_keys = d_keys.clone()  # an operator's results may not alias
    d_scale = torch.zeros((), dtype=torch.float32, device=anchors.device) if by_scale is None else by_scale.sum()
    return d_anchors, d_keys, d_scale


def _statistics(grad: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Room for the statistics; for fp16 rows also for the lift of their slopes, and the largest incoming gradient."""
    grad = grad.to(torch.float32).contiguous()
    statistics = torch.empty(grad.numel(), 4, dtype=torch.float32, device=grad.device)
    if anchors.dtype != torch.float16 or not grad.numel():
        return statistics, None, None, grad
    return statistics, torch.ones((), device=grad.device), torch.linalg.vector_norm(grad, float("inf")), grad


def _intervals(intervals: list[Tensor]) -> list[Tensor]:
    return [bound.to(torch.int32).contiguous() for bound in intervals]


def _weighting(hardness: float, log_weight: Tensor | None) -> float | None:
    """Hardness, or None for uniform weights, which need no exponential."""
    return None if hardness == 0 and log_weight is None else hardness


def _weights_are_safe(keys: Tensor, scale_bound: float | None, hardness: float) -> bool:
    return scale_bound is not None and is_safe(keys.shape[0], abs(hardness), torch.float32)


def _tiling(tiles: Config, rows: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_I": tiles.block_i,
        "BLOCK_J": tiles.block_j,
        "BLOCK_D": max(triton.next_power_of_2(rows.shape[1]), 16),
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def _launch(kernel: Any, like: Tensor, tiles: Config, *args: Any, **constants: Any) -> None:
    """Run one program for each block of the leading dimension of `like`, on its device."""
    if like.shape[0] == 0:
        return
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[(triton.cdiv(like.shape[0], tiles.block_i),)](
            *args, **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages
        )
