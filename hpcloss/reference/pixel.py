"""Contrast of sampled pixels, dense."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, lse, reduce, softplus, unit
from hpcloss.reference.region import labels_at


def pixel_contrast_loss(
    features: Tensor,
    labels: Tensor,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    *,
    num_classes: int,
    background: int | None = None,
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Pixels of the whole batch, each positive against its own denominator; optionally a bank as further keys.

        L_i = -1/|P(i)| Σ_{j in P(i)} log( e^{l_ij} / ( e^{l_ij} + Σ_{n in N(i)} e^{l_in} ) )

    Wang et al., ICCV 2021 (arXiv 2101.11939); the other positives are not in the denominator. P(i), N(i): the pixels of
    the batch, without i, and the rows of the bank (in the authors' code these alone, where there are any), of the label
    of i and of another one. Counted: at least one of each.
    Sampling is not done here: to leave pixels out is to ignore them.

    features [B, D, *S]; labels [B, *S'] or [B, 1, *S'], those outside [0, num_classes) are ignored; bank [M, D] as
    stored, not differentiated; bank_labels [M]. Returns a scalar, or [B, *S] with reduction="none"; "class" averages
    the means of classes.
    """
    batch, dim, *spatial = features.shape
    y = labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(-1)
    pixels = features.movedim(1, -1).reshape(-1, dim)
    rows = (is_valid(y, ignore_index) & (y >= 0) & (y < num_classes)).nonzero().squeeze(1)
    x, label = unit(pixels[rows], normalize), y[rows]
    keys, key_label = x, label
    if bank is not None and bank_labels is not None:
        here = is_valid(bank_labels, ignore_index)
        keys = torch.cat([x, bank[here].detach().to(x.dtype)])
        key_label = torch.cat([label, bank_labels[here]])
    itself = torch.arange(len(x), device=x.device)[:, None] == torch.arange(len(keys), device=x.device)
    positive = (label[:, None] == key_label) & ~itself
    negative = label[:, None] != key_label
    logit = x @ keys.T / temperature
    each = softplus(lse(logit, negative).unsqueeze(-1) - logit)
    mean = torch.where(positive, each, 0.0).sum(-1) / positive.sum(-1).clamp(min=1).to(x.dtype)
    counts = positive.any(-1) & negative.any(-1)
    if background is not None:
        counts &= label != background
    loss = (torch.zeros_like(pixels[:, 0]) + pixels[:0].sum()).index_put((rows,), torch.where(counts, mean, 0.0))
    counted = torch.zeros_like(y, dtype=torch.bool).index_put((rows,), counts)
    loss = reduce(loss, counted, reduction, {"class": y})
    return loss.reshape(batch, *spatial) if reduction == "none" else loss
