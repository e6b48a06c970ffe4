"""Contrast of uncertain pixels with certain ones, dense."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, reduce, unit
from hpcloss.reference.region import contrast, labels_at


def entropy_guided_contrast_loss(
    features: Tensor,
    probs: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    threshold: float | str = "mean",
    entropy_classes: bool = False,
    denominator: str = "own",
    symmetric: bool = False,
    detach_keys: bool = True,
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Pixels of high entropy pulled to those of low entropy of their class, away from those of other classes.

        H_i = -Σ_c p_ic log p_ic;   i is high where H_i > the mean of H over its image, or > threshold * log C
        L_i = 1/|P(i)| Σ_{j in P(i)} [ log( e^{l_ij} + Σ_{n in N(i)} e^{l_in} ) - l_ij ],   "own"
        L_i = log Σ_{k in P(i) or N(i)} e^{l_ik} - 1/|P(i)| Σ_{j in P(i)} l_ij,             "all"

    Anchors are the high pixels; P(i), N(i): the low pixels of the batch with the label of i, and with another one.
    With `symmetric` half of that and half of the same with high and low exchanged. With `entropy_classes` every pixel
    is an anchor, every other pixel a key, and only pixels of one label and one side of the threshold are positives.
    Keys are constants unless detach_keys=False, p is one. Counted: at least one positive and, in "own", one negative.

    Xie, Wu and Zhu, IET Image Processing 18(2), 2024 (EGCL-Net). No code and no printed equation was available: this is
    a reconstruction from the abstract.

    features [B, D, *S]; probs [B, C, *S]; labels [B, *S'] or [B, 1, *S'], by default the most probable class; labels
    outside [0, C) are ignored. Returns a scalar, or [B, *S] with reduction="none".
    """
    batch, dim, *spatial = features.shape
    labels = probs.argmax(1) if labels is None else labels
    y = labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(-1)
    valid = is_valid(y, ignore_index) & (y >= 0) & (y < probs.shape[1])
    entropy = torch.special.entr(probs.detach()).sum(1).reshape(batch, -1)
    if isinstance(threshold, str):
        inside = valid.view_as(entropy)
        level = torch.where(inside, entropy, 0.0).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
    else:
        level = torch.full_like(entropy[:, :1], threshold * math.log(probs.shape[1]))
    high = (entropy > level).reshape(-1)

    pixels = features.movedim(1, -1).reshape(-1, dim)
    x = unit(torch.where(valid[:, None], pixels, 0.0), normalize)
    s = x @ (x.detach() if detach_keys else x).T
    both = valid[:, None] & valid
    same = y[:, None] == y

    def one_side(pair: Tensor, positive: Tensor) -> Tensor:
        loss, counted = contrast(s, pair & positive, pair & ~positive, temperature, 0.0, 0.0, denominator, True)
        loss = reduce(loss, counted, reduction, {"class": y})
        return loss.reshape(batch, *spatial) if reduction == "none" else loss

    if entropy_classes:
        others = both & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
        return one_side(others, same & (high[:, None] == high))
    loss = one_side(both & high[:, None] & ~high, same)
    return (loss + one_side(both & ~high[:, None] & high, same)) / 2 if symmetric else loss
