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
    """Radford et al., "Learning transferable visual models from natural language supervision" (2021), fig. 3.

    Args: open_clip's. world_size other than 1: images and texts of every process, with exact gradients under
    DistributedDataParallel, whatever the first three say; ValueError in a call where there are not as many processes,
    or where `rank` is not that of the process.
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
        """image_features, text_features [N, D], taken as they are; logit_scale multiplies their products.

        A logit_bias moves all logits of a softmax alike: no change of the loss, a zero gradient. With output_dict the
        loss is the entry "contrastive_loss".
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
