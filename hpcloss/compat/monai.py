"""MONAI's `ContrastiveLoss`: two views of a batch of vectors."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn.modules.loss import _Loss

from hpcloss.compat.base import check_vector_options
from hpcloss.losses.vectors import ntxent_loss


class ContrastiveLoss(_Loss):
    """NT-Xent of Chen et al. (ICML 2020) as MONAI calls it: cosines, mean over the rows of both views.

    Args:
        temperature: positive number, or a 0-dim tensor.
        batch_size: without effect; a warning if it is given.
    """

    def __init__(self, temperature: float | Tensor = 0.5, batch_size: int = -1):
        super().__init__()
        check_vector_options(temperature)
        self.temperature = temperature
        if batch_size != -1:
            warnings.warn(f"batch_size={batch_size} has no effect: the batch has its own size", stacklevel=2)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target [N, D]: row i of both shows image i. ValueError for other and for differing shapes."""
        if input.dim() > 2 or target.dim() > 2:
            raise ValueError(
                f"input and target must have at most 2 dimensions, got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        if input.shape != target.shape:
            raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
        return ntxent_loss(input, target, self.temperature)
