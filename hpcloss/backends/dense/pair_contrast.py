"""`pair_contrast`: losses of anchors and their slopes from one S.

The slopes are made where the similarities are. Backward multiplies them by the incoming gradients and has one product
to do. They are kept where all rows are one region; else backward makes them again, batch by batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import LN2, LOG2E, accumulation, gradients
from hpcloss.backends.dense.batches import Batch, batches
from hpcloss.backends.dense.forms import FORMS, Found, Options
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
    needs_slopes: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each anchor [N], 0 where it is not counted, and which are counted; equations in `contrast`.

    Also what backward needs: the slopes, as many as there are pairs, and d loss / d scale [N]. Both are empty where
    they are not needed, or made again.
    """
    at, (anchors, others) = Intervals(*intervals), accumulation(anchors, keys)
    options, scale = Options(denominator, hardness, discount, detach_weights, multiplicity), scale.to(anchors.dtype)
    kept = anchors.shape[0] * (anchors if others is None else others).shape[0] if at.key_end.numel() == 1 else 0
    loss, counted, by_scale, slopes = None, None, None, anchors.new_empty(0)
    for batch in batches(anchors, others, at):
        found, scaled = _losses(batch, scale, options, needs_scale)
        if needs_slopes and kept:
            slopes = found.slope.flatten() if found.slope.numel() == kept else _enlarged(found.slope, kept)
        loss, counted = batch.merged(found.loss, loss), batch.merged(found.counted, counted)
        by_scale = None if scaled is None else batch.merged(scaled, by_scale)
    if loss is None or counted is None:
        loss = anchors.new_zeros(anchors.shape[0])
        counted, by_scale = torch.zeros_like(loss, dtype=torch.bool), torch.zeros_like(loss)
        slopes = anchors.new_zeros(kept if needs_slopes else 0)
    return loss, counted, slopes, by_scale if needs_scale and by_scale is not None else anchors.new_empty(0)


def _enlarged(slopes: Tensor, count: int) -> Tensor:
    """The slopes in front of a vector of a length that is known from shapes alone."""
    kept = slopes.new_empty(count)
    kept[: slopes.numel()] = slopes.flatten()
    return kept


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
    grad, scale = grad.to(anchors.dtype), scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if others is None else torch.zeros_like(others) if needs_keys else None
    of_pairs = grad * scale
    for batch in batches(anchors, others, at) if needs_anchors or needs_keys else ():
        if slopes.numel():
            shape = (batch.number, batch.anchors.shape[1], batch.keys.shape[1])
            slope = slopes[: math.prod(shape)].view(shape) * batch.take(of_pairs)[..., None]
        else:
            slope = _losses(batch, scale, options, False)[0].slope.mul_(batch.take(of_pairs)[..., None])
        batch.add_gradients(slope, d_anchors, d_keys)
    d_scale = torch.dot(grad, by_scale) if needs_scale else anchors.new_zeros(())
    return gradients(anchors, d_anchors, None if others is None else d_keys, d_scale)


def _losses(batch: Batch, scale: Tensor, options: Options, needs_scale: bool) -> tuple[Found, Tensor | None]:
    """Losses and slopes of a batch, slopes by similarities over the scale; and d loss / d scale [R, n] if asked for."""
    logits = batch.similarities(scale * LOG2E)
    kept = logits.clone() if needs_scale else None  # the forms overwrite them
    found = FORMS[options.denominator](batch, logits, scale, options)
    by_scale = None if kept is None else torch.linalg.vecdot(found.slope, kept) * (LN2 / scale)
    if found.direct is not None:
        found.slope.add_(found.direct)
    return found, by_scale
