"""SupContrast's `SupConLoss`: views of images, with labels, a mask of positives, or neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcloss.compat.base import check_vector_options, times
from hpcloss.losses.vectors import supcon_loss
from hpcloss.operators import plain, statistics_dtype
from hpcloss.plan.partition import partition
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale


class SupConLoss(nn.Module):
    """Supervised contrast with the signature of SupContrast's `SupConLoss`.

        L = T / T_base · 1/n Σ_i [ log Σ_{j≠i} e^{l_ij} - 1/|P(i)| Σ_{p∈P(i)} l_ip ]

    i runs over all n anchors. l_ij = ⟨x_i, x_j⟩ / T is the logit of rows i and j; rows are not normalised. P(i), the
    positives, are the other rows with the label of i. An anchor without a positive adds 0 and is counted.

    Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2. The value is that of the authors'
    code; the loss stays finite where that code underflows (`docs/differences.md`).

    Args:
        temperature: T. A positive number, or a tensor with one element.
        contrast_mode: "all": every view is an anchor. "one": the first view alone; all views are keys.
        base_temperature: T_base.

    Raises:
        ValueError: An option or a shape is invalid, or both labels and a mask are given.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.supcontrast import SupConLoss
        >>> features = torch.eye(2)[:, None].expand(2, 2, 2)  # two equal views of two images
        >>> round(SupConLoss(temperature=1.0, base_temperature=1.0)(features).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    def __init__(self, temperature: float | Tensor = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        check_vector_options(temperature)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Compute the loss of several views of images.

        Without labels and mask the other views of an image are its positives (SimCLR).

        Args:
            features: `[N, views, ...]`.
            labels: Label of each image `[N]`.
            mask: `[N, N]`. Entry (i, j) is the weight of image j as a positive of image i, symmetric or not.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 features).
        """
        check_vector_options(self.temperature)  # a script may have set another
        if features.dim() < 3:
            raise ValueError(f"features must have shape [N, views, ...], got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"Unknown mode: {self.contrast_mode}; contrast_mode must be 'all' or 'one'")
        images, views = features.shape[:2]
        rows = plain(features).flatten(2).transpose(0, 1).flatten(0, 1)  # view by view
        if mask is None:
            if labels is None:
                labels = torch.arange(images, device=features.device)
            elif labels.numel() != images:
                raise ValueError(f"Num of labels does not match num of features: {labels.numel()} and {images}")
            labels = labels.reshape(-1).repeat(views)
            loss = supcon_loss(
                rows, labels, None, None, self.temperature, ignore_index=(), normalize=False, reduction="none"
            )
        else:
            loss = self._masked(rows, mask, images, views)
        anchors = loss if self.contrast_mode == "all" else loss[:images]
        return times(anchors.sum() / max(anchors.numel(), 1), self.temperature / self.base_temperature)

    def _masked(self, rows: Tensor, mask: Tensor, images: int, views: int) -> Tensor:
        """Loss of each row. The sum over positives is linear in the mask, so the mask of images is enough."""
        if mask.shape != (images, images):
            raise ValueError(f"mask must have shape {(images, images)}, got {tuple(mask.shape)}")
        pairs = partition(torch.zeros(len(rows), dtype=torch.int64, device=rows.device))  # leaves the order as it is
        packed = pack(rows, pairs.order, normalize=False, permutation=True)
        scale = Scale.of(self.temperature, packed, False)
        lse = pair_lse(packed, pairs, "others", scale)
        with torch.autocast(rows.device.type, enabled=False):
            x = rows.to(statistics_dtype(rows.dtype)).view(views, images, -1)
            mask = mask.to(x)
            own = mask.diagonal()
            # In float64, which autocast leaves alone: the backward pass of the product may run under it.
            summed = (mask.double() @ x.sum(0).double()).to(x)
            positive = (x * summed).sum(2) - own * x.square().sum(2)
            weight = (views * mask.sum(1) - own).repeat(views)
        logit = scale.value * positive.reshape(-1) - torch.where(weight == 0, 0.0, lse) * weight
        return -logit / torch.where(weight < 1e-6, 1.0, weight)
