"""The Triton backend: fused, streaming kernels on NVIDIA GPUs, fp16, bf16 and fp32 rows with fp32 statistics.

Each function launches what the other modules define; shapes and pointers are checked by nobody below this line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hpcloss.backends.bounds import is_safe
from hpcloss.backends.triton import configs, launch, segments
from hpcloss.backends.triton import pack as pack_kernels
from hpcloss.backends.triton import pair_cross_entropy as cross_entropy_kernels
from hpcloss.backends.triton import pair_lse as lse_kernels
from hpcloss.backends.triton import pair_mean as mean_kernels
from hpcloss.backends.triton.backward import backward_kernel
from hpcloss.backends.triton.configs import Config, config
from hpcloss.backends.triton.launch import int32
from hpcloss.backends.triton.probe import interpreted
from hpcloss.backends.triton.tile import largest_kernel

ROWS = 1024  # of a program that works row by row


def rows_dtype(features: Tensor, normalize: bool) -> torch.dtype:
    """fp16 for unit rows of half precision (there it is 8 times as exact as bf16), else bf16 for its range."""
    if features.dtype == torch.float64:
        raise NotImplementedError("float64 needs backend 'blockwise', and here one of several inputs is float64")
    if features.dtype == torch.float32:
        return torch.float32
    if normalize:
        return torch.float16
    # No bf16 in the matrix unit of Turing, nor right in the interpreter.
    no_bf16 = interpreted() or configs.capability(features.device) < 80
    return torch.float32 if no_bf16 else torch.bfloat16


def pack(features: Tensor, order: Tensor, live: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows `order` of the map [n, D], those from `live` on zero, and the inverse norm of each [n]."""
    return pack_kernels.pack(features, order, live, normalize, rows_dtype(features, normalize))


pack_backward = pack_kernels.pack_backward
segment_mean = segments.segment_mean


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
    others = _keys(anchors, keys)
    online = bias is not None or not is_safe(others.shape[0], scale_bound, torch.float32)
    lse = torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device)
    at = int32(intervals)
    tiles = config("pair_lse", anchors)
    _launch(
        lse_kernels.forward_kernel, lse, tiles,
        anchors, others, _fp32(bias), _fp32(scale), lse, *at, lse.numel(), at[3].numel(),
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
    statistics, lift = _lse_statistics(grad, lse, anchors, scale, online)
    return _backward(
        anchors, keys, statistics, lift, bias, scale, None, None, None, intervals,
        dict(SLOPE=lse_kernels.slope, TERM="lse", RULE=rule, ONLINE=online),
        "backward" if bias is None else "weighted_backward",
        needs_anchors, needs_keys, needs_scale,
    )  # fmt: skip


def pair_lse_both(
    anchors: Tensor, keys: Tensor, scale: Tensor, scale_bound: float | None, intervals: list[Tensor], rule: str
) -> tuple[Tensor, Tensor]:
    """lse over the keys of each anchor [N] and over the anchors of each key [M]; -inf for an empty set."""
    keys = _keys(anchors, keys)
    rows = pair_lse(anchors, keys, None, scale, scale_bound, intervals, rule)
    return rows, pair_lse(keys, anchors, None, scale, scale_bound, _exchanged(keys, intervals, rule), rule)


def pair_lse_both_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale (g_i exp(scale s_ij - row_i) + h_j exp(scale s_ij - column_j)), as d anchors, d keys, d scale."""
    keys = _keys(anchors, keys)
    count = max(anchors.shape[0], keys.shape[0])
    pair = {
        "SLOPE": lse_kernels.slope,
        "TERM": "lse",
        "RULE": rule,
        "ONLINE": not is_safe(count, scale_bound, torch.float32, twice=True),
    }
    # One lift for both sides: their slopes add.
    both = torch.cat([grad_rows, grad_columns]), torch.cat([rows, columns])
    statistics, lift = _lse_statistics(*both, anchors, scale, pair["ONLINE"])
    of_anchors, of_keys = statistics.split([anchors.shape[0], keys.shape[0]])
    values, none = (None, _fp32(scale), None, None, None, lift), (None, None)
    gradients, parts = [], []
    for own, other, of_own, of_other, at, wanted in (
        (anchors, keys, of_anchors, of_keys, intervals, needs_anchors),
        (keys, anchors, of_keys, of_anchors, _exchanged(keys, intervals, rule), needs_keys),
    ):
        *positives, own_start, own_end, other_start, other_end = int32(at)
        parts.append(torch.zeros_like(of_own[:, 0]) if needs_scale else None)
        regions = (own_start, own_end, other_start, other_end, *none)
        gradients.append(
            _own(own, other, of_own, of_other, values, positives, regions, pair, "backward", wanted, parts[-1])
        )
    return *gradients, _sum_if_wanted(torch.cat(parts) if needs_scale else None, anchors)


def _exchanged(keys: Tensor, intervals: list[Tensor], rule: str) -> list[Tensor]:
    """The pairs with anchors and keys exchanged; rule "every" knows no positives, else they are their own inverse."""
    *positives, anchor_start, anchor_end, key_start, key_end = intervals
    if rule == "every":
        positives = [torch.zeros(keys.shape[0], dtype=torch.int32, device=keys.device)] * 3
    if key_start.numel() > 1:
        # Kernels search the regions of their own rows, which must ascend; those of keys may come in any order.
        is_filled = key_start < key_end
        key_end, order = torch.sort(torch.where(is_filled, key_end, 0), stable=True)
        key_start, anchor_start, anchor_end = (
            bound[order] for bound in (torch.where(is_filled, key_start, 0), anchor_start, anchor_end)
        )
    return [*positives, key_start, key_end, anchor_start, anchor_end]


def pair_cross_entropy(
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_i = sum_{j in positives(i)} w_ij (lse_i - scale s_ij), w = softmax over the positives of (-hardness s_ij).

    Returns loss, lse, the weights' lse ("mass"), and for the backward pass the largest similarity ("shift") and the sum
    relative to it, [N] each.
    """
    results = [torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device) for _ in range(5)]
    at, weighting = int32(intervals), _weighting(hardness, None)
    tiles = config("pair_cross_entropy" if weighting is None else "weighted_cross_entropy", anchors)
    _launch(
        cross_entropy_kernels.forward_kernel, results[0], tiles,
        anchors, _keys(anchors, keys), _fp32(scale), weighting, *results,
        *at, anchors.shape[0], at[3].numel(), D=anchors.shape[1], **_tiling(tiles, anchors),
    )  # fmt: skip
    return tuple(results)


def pair_cross_entropy_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    mass: Tensor,
    shift: Tensor,
    total: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale ((g_i + h_i) p_ij - g_i w_ij), for incoming gradients g of the loss and h of the lse."""
    weighting, grad_lse = _weighting(hardness, None), _fp32(grad_lse)
    statistics, lift, largest_grads, grad = _statistics(grad, mass, anchors, grad_lse, total)
    launch.run(
        cross_entropy_kernels.statistics_kernel, triton.cdiv(mass.numel(), ROWS), mass,
        grad, grad.stride(0), grad_lse, mass, shift, total, *int32(intervals[:3]), _fp32(scale), weighting,
        largest_grads, lift, statistics, mass.numel(), BLOCK=ROWS,
    )  # fmt: skip
    d_anchors, d_keys, d_scale = _backward(
        anchors, keys, statistics, lift, None, scale, weighting, None, None, intervals,
        dict(SLOPE=cross_entropy_kernels.slope, TERM="cross_entropy", RULE="others", ONLINE=True),
        "cross_entropy_backward" if weighting is None else "weighted_cross_entropy_backward",
        needs_anchors or needs_scale, needs_keys, False,
    )  # fmt: skip
    if needs_scale:
        # S depends on the scale as on the anchors' length; in self-contrast d holds both sides of each pair.
        d_scale = (anchors * d_anchors).sum() / (_fp32(scale) * (2 if keys is None else 1))
    return d_anchors if needs_anchors else d_anchors.new_empty(0), d_keys, d_scale


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
    if _needs_no_pairs(keys, stat, log_weight, hardness):
        return segments.linear_mean(anchors, scale, intervals)
    others = _keys(anchors, keys)
    # A bound is given for unit rows alone: there |hardness s| is at most |hardness|.
    unit_bound = None if scale_bound is None else abs(hardness)
    online = log_weight is not None or not is_safe(others.shape[0], unit_bound, torch.float32)
    out = torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device)
    mass, slope = torch.empty_like(out), torch.empty_like(out)
    at = int32(intervals)
    tiles = config("pair_mean", anchors)
    _launch(
        mean_kernels.forward_kernel, out, tiles,
        anchors, others, _fp32(stat), _fp32(log_weight), _fp32(scale), _weighting(hardness, log_weight),
        discount or None, out, mass, slope,
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
    if _needs_no_pairs(keys, stat, log_weight, hardness):
        return segments.linear_mean_backward(grad, out, mass, anchors, scale, intervals, needs_anchors, needs_scale)
    count = (anchors if keys is None else keys).shape[0]
    pull = None if detach_weights or hardness == 0 else -hardness
    # Two factors 1 + exp(stat_i - (scale - discount) s), which one reciprocal serves, and a weight.
    bound = None if scale_bound is None else 2 * (scale_bound + abs(discount)) + abs(hardness)
    safe = is_safe(count, bound, torch.float32, twice=True, margin=math.log(max(count, 1)))
    online = log_weight is not None or pull is not None or needs_scale or not safe
    weighting = _weighting(hardness, log_weight)
    term = "logit" if stat is None else "own"
    statistics, lift, largest_grads, grad = _statistics(grad, mass, anchors)
    launch.run(
        mean_kernels.statistics_kernel, triton.cdiv(out.numel(), ROWS), out,
        grad, grad.stride(0), out, mass, _fp32(stat), _fp32(scale), weighting, pull, discount or None,
        largest_grads, lift, statistics, out.numel(), TERM=term, ONLINE=online, BLOCK=ROWS,
    )  # fmt: skip
    return _backward(
        anchors, keys, statistics, lift, log_weight, scale, weighting, pull, discount or None, intervals,
        dict(SLOPE=mean_kernels.slope, TERM=term, RULE="positives", ONLINE=online),
        "weighted_backward" if online else "backward",
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
    discount: float | None,
    intervals: list[Tensor],
    pair: dict[str, Any],
    shape: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the anchors' statistics: one pass in self-contrast, else one for each side that needs it."""
    keys = None if keys is None else _keys(anchors, keys)
    *positives, anchor_start, anchor_end, key_start, key_end = int32(intervals)
    at_anchors, at_keys, no_anchors = (anchor_start, anchor_end), (key_start, key_end), (None, None)
    values = (_fp32(key_bias), _fp32(scale), hardness, pull, discount, lift)
    by_scale = torch.empty_like(statistics[:, 0]) if needs_scale else None
    d_keys = torch.empty(0, dtype=torch.float32, device=anchors.device)
    if keys is None:
        # Here every row of a region is a key, and meets its region.
        sides, at = (anchors, anchors, statistics, statistics), (*at_keys, *at_keys, *at_anchors)
        d_anchors = _own(*sides, values, positives, at, pair, shape, needs_anchors, by_scale)
    else:
        sides, at = (anchors, keys, statistics, None), (*at_anchors, *at_keys, *no_anchors)
        d_anchors = _own(*sides, values, positives, at, pair, shape, needs_anchors, by_scale)
        if needs_keys:
            sides, at = (keys, anchors, None, statistics), (*at_keys, *at_anchors, *no_anchors)
            d_keys = _own(*sides, values, positives, at, pair, shape, True, None)
    return d_anchors, d_keys, _sum_if_wanted(by_scale, anchors)


def _own(
    own: Tensor,
    other: Tensor,
    own_statistics: Tensor | None,
    other_statistics: Tensor | None,
    values: tuple[Any, ...],
    positives: Sequence[Tensor],
    regions: tuple[Tensor | None, ...],
    pair: dict[str, Any],
    shape: str,
    wanted: bool,
    by_scale: Tensor | None,
) -> Tensor:
    """The gradient of the own rows, from one pass over the other rows; by_scale [N] is written where it is given."""
    gradient = torch.empty(own.shape if wanted else (0,), dtype=torch.float32, device=own.device)
    if wanted or by_scale is not None:
        tiles = config(shape, own)
        _launch(
            backward_kernel, own, tiles,
            own, other, own_statistics, other_statistics, *values, gradient if wanted else None, by_scale,
            *positives, *regions, own.shape[0], other.shape[0], regions[0].numel(),
            D=own.shape[1], **pair, **_tiling(tiles, own),
        )  # fmt: skip
    return gradient


def _sum_if_wanted(by_scale: Tensor | None, rows: Tensor) -> Tensor:
    # What nobody asked for is not even written.
    return torch.empty((), dtype=torch.float32, device=rows.device) if by_scale is None else by_scale.sum()


def _lse_statistics(
    grad: Tensor, lse: Tensor, rows: Tensor, scale: Tensor, online: bool
) -> tuple[Tensor, Tensor | None]:
    statistics, lift, largest_grads, grad = _statistics(grad, lse, rows)
    launch.run(
        lse_kernels.statistics_kernel, triton.cdiv(lse.numel(), ROWS), lse,
        grad, grad.stride(0), lse, _fp32(scale), largest_grads, lift, statistics, lse.numel(),
        ONLINE=online, BLOCK=ROWS,
    )  # fmt: skip
    return statistics, lift


def _statistics(
    grad: Tensor, empty: Tensor, rows: Tensor, grad_lse: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Room for the statistics; for fp16 rows also for the lift of their slopes, and the largest incoming gradients.

    empty [N]: -inf for a row without pairs, whose incoming gradient means nothing. grad_lse: a second gradient, which
    means nothing where `total` [N] is 0.
    """
    grad = grad.to(torch.float32)  # that of a mean has stride 0
    statistics = grad.new_empty(grad.numel(), 4)
    if rows.dtype != torch.float16 or not grad.numel():
        return statistics, None, None, grad
    lift = grad.new_empty(())
    if grad_lse is None and grad.stride(0) == 0:
        return statistics, lift, grad, grad  # one gradient for all rows
    bound = grad = grad.contiguous()
    if grad_lse is not None:
        bound = torch.where(empty == -math.inf, 0.0, grad.abs()) + torch.where(total == 0, 0.0, grad_lse.abs())
        empty = bound
    blocks = triton.cdiv(grad.numel(), ROWS)
    largest = grad.new_empty(blocks)
    launch.run(largest_kernel, blocks, bound, bound, bound.stride(0), empty, largest, bound.numel(), BLOCK=ROWS)
    return statistics, lift, largest, grad


def _fp32(values: Any) -> Any:
    """Row vectors and scalars as kernels read them."""
    return None if values is None else values.to(torch.float32).contiguous()


def _keys(anchors: Tensor, keys: Tensor | None) -> Tensor:
    """The other rows, in the anchors' dtype: a matrix unit multiplies equals (fp16 views meet an fp32 memory bank)."""
    return anchors if keys is None else keys.to(anchors.dtype)


def _needs_no_pairs(keys: Tensor | None, stat: Tensor | None, log_weight: Tensor | None, hardness: float) -> bool:
    """Whether the mean is one of a linear term with uniform weights in self-contrast: class sums give it."""
    return keys is None and stat is None and log_weight is None and hardness == 0


def _weighting(hardness: float, log_weight: Tensor | None) -> float | None:
    """Hardness, or None for uniform weights, which need no exponential."""
    return None if hardness == 0 and log_weight is None else hardness


def _tiling(tiles: Config, rows: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_I": tiles.block_i,
        "BLOCK_J": tiles.block_j,
        "BLOCK_D": max(triton.next_power_of_2(rows.shape[1]), 16),
        "PRECISION": "tf32" if configs.precision(rows) == "tf32" else "ieee",  # of no meaning for half precision
    }


def _launch(kernel: Any, like: Tensor, tiles: Config, *args: Any, **constants: Any) -> None:
    """Run one program for each block of the leading dimension of `like`."""
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.maxnreg is not None:
        options["maxnreg"] = tiles.maxnreg
    launch.run(kernel, triton.cdiv(like.shape[0], tiles.block_i), like, *args, **constants, **options)
