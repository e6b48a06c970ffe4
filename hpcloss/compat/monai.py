"""MONAI's `ContrastiveLoss`: two views of a batch of vectors."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn.modules.loss import _Loss

from hpcloss.compat.base import check_vector_options
from hpcloss.losses.vectors import ntxent_loss


class ContrastiveLoss(_Loss):
    """NT-Xent with the signature of MONAI's `ContrastiveLoss`.

        L_i = -log( e^{l_i+} / Σ_{j≠i} e^{l_ij} )

    i and j run over the rows of both views. l_ij is the cosine of rows i and j, divided by the temperature; l_i+ is
    that of row i and the other view of its image. The loss is the mean over all rows.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations" (ICML 2020), eq. 1.

    Args:
        temperature: A positive number, or a tensor with one element.
        batch_size: No effect. A value gives a warning.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.monai import ContrastiveLoss
        >>> input = target = torch.eye(2)
        >>> round(ContrastiveLoss(temperature=1.0)(input, target).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    def __init__(self, temperature: float | Tensor = 0.5, batch_size: int = -1):
        super().__init__()
        check_vector_options(temperature)
        self.temperature = temperature
        if batch_size != -1:
            warnings.warn(f"batch_size={batch_size} has no effect: the batch has its own size", stacklevel=2)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of two views.

        Args:
            input: `[N, D]`. Row i shows image i.
            target: `[N, D]`. Row i shows image i too.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 inputs).
        """
        if input.dim() > 2 or target.dim() > 2:
            raise ValueError(
                f"input and target must have at most 2 dimensions, got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        if input.shape != target.shape:
            raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
        return ntxent_loss(input, target, self.temperature)
