"""open_clip's `ClipLoss`: images and texts look for each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpcloss.compat.base import PeerLoss
from hpcloss.distributed import world_size as ranks
from hpcloss.losses.vectors import infonce_loss
from hpcloss.operators import statistics_dtype


class ClipLoss(PeerLoss):
    """Symmetric InfoNCE of images and texts, with the signature of open_clip's `ClipLoss`.

        L = 1/(2N) Σ_i [ -log( e^{s x_i·y_i} / Σ_j e^{s x_i·y_j} ) - log( e^{s x_i·y_i} / Σ_j e^{s x_j·y_i} ) ]

    x_i and y_i are the features of image i and of its text, taken as they are. s is `logit_scale`.

    Source: Radford et al., "Learning transferable visual models from natural language supervision" (2021), fig. 3. On
    several processes the gradient is that of the whole batch, whatever the first three options are; in open_clip only
    `gather_with_grad` gives it.

    Args:
        local_loss: No effect.
        gather_with_grad: No effect.
        cache_labels: No effect.
        rank: Rank of this process, if `world_size` is above 1.
        world_size: 1: the images and texts of this process. Otherwise the number of processes, whose images and texts
            are all used.

    Raises:
        ValueError: In a call, `world_size` or `rank` is not that of the default process group, or a shape is invalid.
        TypeError: In a call, a dtype is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.open_clip import ClipLoss
        >>> images = texts = torch.eye(3)
        >>> round(ClipLoss()(images, texts, logit_scale=1.0).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    lacks = ("labels", "prev_num_logits")

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss of images and texts.

        Args:
            image_features: `[N, D]`, taken as they are.
            text_features: `[N, D]`, taken as they are. Row i belongs to image i.
            logit_scale: Factor of the inner products.
            logit_bias: No effect on the loss, as it moves all logits of a softmax alike. Its gradient is zero.
            output_dict: Return the loss as the entry "contrastive_loss" of a dict.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 features), or a dict with it.
        """
        dtype, device = statistics_dtype(image_features.dtype), image_features.device
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=device)
        if self.world_size not in (1, ranks()):
            raise ValueError(f"world_size={self.world_size}, but the default process group has {ranks()} processes")
        if self.world_size > 1 and self.rank != dist.get_rank():
            raise ValueError(f"rank must be that of this process, {dist.get_rank()} of {ranks()}, got {self.rank}")
        loss = infonce_loss(
            image_features, text_features, None, 1 / scale, symmetric=True, normalize=False, gather=self.world_size > 1
        )
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.to(loss).sum()
        return {"contrastive_loss": loss} if output_dict else loss
