"""`pair_contrast`: losses of anchors and their slopes from one S.

The forward pass computes the slopes, because the similarities are there. Backward multiplies them by the incoming
gradients and computes one product. The slopes are kept if there is room (`pytorch.kept_slopes`); otherwise backward
computes them again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import LN2, LOG2E, accumulation, cast, gradients
from hpcloss.backends.dense.batches import Batch, batches
from hpcloss.backends.dense.forms import FORMS, Found, Options
from hpcloss.backends.dense.rows import is_native, native_contrast, native_gradients
from hpcloss.plan.partition import Intervals


def pair_contrast(
    anchors: Tensor,
    keys: Tensor | None,
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
    """Loss of each anchor [N], 0 if it does not count, and whether it counts. The equations are in `contrast`.

    Also for backward: the slopes, if `kept` of them are to be kept, and d loss / d scale [N].
    """
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    options, scale = Options(denominator, hardness, discount, detach_weights, multiplicity), cast(scale, anchors.dtype)
    slopes = anchors.new_empty(kept)
    by_scale = anchors.new_zeros(anchors.shape[0]) if needs_scale else anchors.new_empty(0)
    if is_native(anchors):
        needed = needs_anchors or needs_keys or needs_scale
        loss, counted = native_contrast(anchors, others, at, scale, options, needed, slopes, by_scale)
        return loss, counted, slopes, by_scale.div_(scale) if needs_scale else by_scale
    loss = anchors.new_zeros(anchors.shape[0])
    counted = torch.zeros_like(loss, dtype=torch.bool)
    for batch in batches(anchors, others, at):
        found, scaled = _losses(batch, scale, options, needs_scale)
        batch.put(found.loss, loss)
        batch.put(found.counted, counted)
        if scaled is not None:
            batch.put(scaled, by_scale)
        if _keeps(at, slopes):
            slopes[: found.slope.numel()] = found.slope.flatten()
    return loss, counted, slopes, by_scale


def _keeps(at: Intervals, slopes: Tensor) -> bool:
    """Whether the slopes of batches, which may be padded, are kept: only those of one region."""
    return slopes.numel() > 0 and at.key_end.numel() == 1


def pair_contrast_backward(
    grad: Tensor,
    slopes: Tensor,
    by_scale: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
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
    """dS_ij = g_i scale slope_ij, as d anchors, d keys (one sum in self-contrast), d scale."""
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    options = Options(denominator, hardness, discount, detach_weights, multiplicity)
    grad, scale = cast(grad, anchors.dtype), cast(scale, anchors.dtype)
    of_pairs = grad * scale
    if is_native(anchors):
        d_anchors, d_keys = native_gradients(
            slopes, of_pairs, anchors, others, at, scale, options, needs_anchors, needs_keys
        )
    else:
        d_anchors = torch.zeros_like(anchors) if needs_anchors else None
        d_keys = d_anchors if others is None else torch.zeros_like(others) if needs_keys else None
        for batch in batches(anchors, others, at):
            if _keeps(at, slopes):
                shape = (batch.number, batch.anchors.shape[1], batch.keys.shape[1])
                slope = slopes[: math.prod(shape)].view(shape) * batch.take(of_pairs)[..., None]
            else:
                slope = _losses(batch, scale, options, False)[0].slope.mul_(batch.take(of_pairs)[..., None])
            batch.add_gradients(slope, d_anchors, d_keys)
    d_scale = torch.dot(grad, by_scale) if needs_scale else anchors.new_zeros(())
    return gradients(anchors, d_anchors, None if others is None else d_keys, d_scale)


def _losses(batch: Batch, scale: Tensor, options: Options, needs_scale: bool) -> tuple[Found, Tensor | None]:
    """Losses and slopes of a batch, slopes by similarities over the scale; and d loss / d scale [R, n] if needed."""
    logits = batch.similarities(scale * LOG2E)
    kept = logits.clone() if needs_scale else None  # the forms overwrite the logits
    found = FORMS[options.denominator](batch, logits, scale, options)
    by_scale = None if kept is None else torch.linalg.vecdot(found.slope, kept) * (LN2 / scale)
    if found.direct is not None:
        found.slope.add_(found.direct)
    return found, by_scale
