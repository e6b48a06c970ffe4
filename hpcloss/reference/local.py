"""Local contrast against class means, dense."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, reduce, unit
from hpcloss.reference.region import labels_at


def local_contrast_loss(
    features: Tensor,
    labels: Tensor,
    partner: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    num_classes: int,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Every foreground pixel against the class means of its image x and of the partner x' of that image.

        D(z) = Σ_c' e^{cos(z, m_c'^x) / τ} + Σ_c' e^{cos(z, m_c'^x') / τ}
        L_i  = 1/2 [ -log( e^{cos(z_i, m_c^x) / τ} / D(z_i) ) - log( e^{cos(z_i, m_c^x') / τ} / D(z_i) ) ],   c = y_i
        m_c^x = mean of z over all pixels of class c in image x

    With normalize=False inner products take the place of cosines. Sums run over the foreground classes that an image
    has; where x' lacks class c the first term stands alone, and so without a partner, where D has one sum. Counted:
    every foreground pixel.

    Chaitanya et al., MedIA 2023 (arXiv 2112.09645); they sum both terms instead of averaging, over 3 pixels a class.

    features [B, D, *S]; labels [B, *S'] or [B, 1, *S']; partner [B]: outside [0, B) or the image itself is none.
    Returns a scalar, or [B, *S] with reduction="none"; "class" averages the means of the classes.
    """
    batch, dim, *spatial = features.shape
    y = labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(batch, -1)
    pixels = features.movedim(1, -1).reshape(batch, -1, dim)
    valid = is_valid(y.reshape(-1), ignore_index).view(y.shape) & (y >= 0) & (y < num_classes)
    if background is not None:
        valid &= y != background
    means = [{int(c): pixels[b][valid[b] & (y[b] == c)].mean(0) for c in y[b][valid[b]].unique()} for b in range(batch)]
    losses = []
    for b in range(batch):
        z = unit(torch.where(valid[b][:, None], pixels[b], 0.0), normalize)
        keys = list(means[b].items())
        if partner is not None and 0 <= int(partner[b]) < batch and int(partner[b]) != b:
            keys += means[int(partner[b])].items()
        loss = torch.zeros_like(z[:, 0]) + pixels[b][:0].sum()
        if keys:
            logit = z @ unit(torch.stack([mean for _, mean in keys]), normalize).T / temperature
            positive = y[b][:, None] == torch.tensor([c for c, _ in keys], device=y.device)
            pull = torch.where(positive, logit, 0.0).sum(1) / positive.sum(1).clamp(min=1)
            loss = loss + torch.where(valid[b], torch.logsumexp(logit, 1) - pull, 0.0)
        losses.append(loss)
    loss = torch.cat(losses) if losses else features.sum() + torch.zeros_like(features[:0].reshape(-1))
    loss = reduce(loss, valid.reshape(-1), reduction, {"class": y.reshape(-1)})
    return loss.reshape(batch, *spatial) if reduction == "none" else loss
