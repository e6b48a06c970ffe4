"""Contrast of anchors with other keys, of any size: gradients in the forward pass, in pieces of bounded memory.

A piece holds the similarities of some anchors and all keys. The denominators of these anchors are complete, so their
slopes and both gradients are computed at once. That takes three matrix products; a backward pass that computes S again
takes four. Backward only multiplies the gradients if all anchors weigh alike, as in a mean or a sum. Otherwise it
computes them again with its weights. CPU, fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import cast, gradients
from hpcloss.backends.dense.batches import MOST, Region, regions_of
from hpcloss.backends.dense.forms import Options
from hpcloss.backends.dense.rows import Call, Group
from hpcloss.plan.partition import Intervals


def pair_contrast(
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    denominator: str,
    hardness: float,
    discount: float,
    detach_weights: bool,
    multiplicity: int,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `pair_contrast` of the dense backend. It keeps the needed gradients of anchors and keys, for equal weights."""
    at, options = Intervals(*intervals), Options(denominator, hardness, discount, detach_weights, multiplicity)
    keys, by_scale = cast(keys, anchors.dtype), anchors.new_zeros(anchors.shape[0] if needs_scale else 0)
    found = anchors.new_zeros(kept)
    call = Call(anchors, at, scale, options, by_scale, needs_anchors or needs_keys or needs_scale)
    _add_gradients(call, at, anchors, keys, None, *_parts(found, anchors, keys, needs_anchors, needs_keys))
    if needs_scale:
        by_scale /= scale
    return call.loss, call.counted, found, by_scale


def pair_contrast_backward(
    grad: Tensor,
    kept: Tensor,
    by_scale: Tensor,
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    denominator: str,
    hardness: float,
    discount: float,
    detach_weights: bool,
    multiplicity: int,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale slope_ij, as d anchors, d keys, d scale."""
    at, factor, keys = Intervals(*intervals), grad * scale, cast(keys, anchors.dtype)
    d_anchors, d_keys = _parts(kept, anchors, keys, needs_anchors, needs_keys)
    if d_anchors is not None:
        d_anchors = d_anchors * factor[:, None]
    if d_keys is not None:
        if bool((factor == factor[:1]).all()):  # as in a mean or a sum
            d_keys = d_keys * factor[:1]
        else:
            options = Options(denominator, hardness, discount, detach_weights, multiplicity)
            call = Call(anchors, at, scale, options, anchors.new_empty(0))
            d_keys = torch.zeros_like(keys)
            _add_gradients(call, at, anchors, keys, factor, None, d_keys)
    d_scale = torch.dot(grad, by_scale) if needs_scale else anchors.new_zeros(())
    return gradients(anchors, d_anchors, d_keys, d_scale)


def _parts(
    kept: Tensor, anchors: Tensor, keys: Tensor, needs_anchors: bool, needs_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as views of a vector that holds the needed ones."""
    end = anchors.numel() if needs_anchors else 0
    return kept[:end].view_as(anchors) if needs_anchors else None, kept[end:].view_as(keys) if needs_keys else None


def _add_gradients(
    call: Call,
    at: Intervals,
    anchors: Tensor,
    keys: Tensor,
    factor: Tensor | None,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
) -> None:
    """Compute the losses, write the anchors' gradients and add the keys', for slopes times a factor [N] or 1."""
    for region in regions_of(at):
        own_keys = slice(region.key_start, region.key_end)
        count = max(1, MOST // region.shape()[1])
        buffer = anchors.new_empty(min(count, region.shape()[0]) * region.shape()[1])
        for start in range(region.anchor_start, region.anchor_end, count):
            rows = slice(start, min(start + count, region.anchor_end))
            piece = Group(Region(rows.start, rows.stop, region.key_start, region.key_end))
            slope = call.slopes(piece, anchors, keys, buffer[: (rows.stop - start) * region.shape()[1]])
            if d_anchors is not None:
                torch.mm(slope, keys[own_keys], out=d_anchors[rows])
            if d_keys is not None:
                weighted = anchors[rows] if factor is None else anchors[rows] * factor[rows, None]
                d_keys[own_keys].addmm_(slope.T, weighted)
