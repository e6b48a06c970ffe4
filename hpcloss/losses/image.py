"""Image-level contrast: hard-positive (IHPC)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcloss.checks import below_one, check_options
from hpcloss.functional.image import NO_GROUP, UNFILLED, ihpc_loss
from hpcloss.losses.base import Loss


class IHPCLoss(Loss):
    r"""Contrast of two views of images in which images whose views disagree weigh more.

        L = Σ_i v_i [ log( e^{l_i+} + Σ_{n∈N(i)} e^{l_in} ) - l_i+ ],      v = softmax_i( -hardness · s_i+ )

    over the 2N rows of both views; s_i+ is the cosine of row i and its other view, l = s / temperature, N(i) the rows
    of other images. The weights v are constants to the gradient; hardness 0 is NT-Xent.

    Source: the image-level stage of Tang et al. (ISBI 2023; Pattern Recognition 2024). As for `RegionPHPCLoss`, the
    weighting is our reading of their abstract and figure; the form of their code is `IHPCLoss.published`.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        hardness: 0 weighs all images alike; larger weighs images with dissimilar views more.
        memory_bank: (rows, D) of a queue of past `view2` embeddings that serve as further negatives without gradient;
            kept in `state_dict`, in fp32. None: the batch alone. Each process of a distributed run keeps its own:
            exclude the loss from what is wrapped, or pass broadcast_buffers=False. A call writes it: put the network
            inside an activation checkpoint, not the loss, which would meet its own rows when it is computed again.
        normalize: L2-normalise the rows.
        reduction: "mean", "sum" or "none" ([2N], view1 first; the mean of them is the loss).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".
    """

    beta: float | None  # of the published form, else None
    bank: Tensor
    bank_groups: Tensor
    bank_next: Tensor

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        hardness: float = 1.0,
        *,
        memory_bank: tuple[int, int] | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            ihpc_loss,
            temperature=temperature,
            hardness=hardness,
            beta=None,
            normalize=normalize,
            reduction=reduction,
            gather=gather,
            check_finite=check_finite,
            backend=backend,
        )
        check_options(ihpc_loss, {"memory_bank": memory_bank})
        self.memory_bank = memory_bank
        if memory_bank is not None:
            rows, dim = memory_bank
            self.register_buffer("bank", torch.zeros(rows, dim, dtype=torch.float32))
            self.register_buffer("bank_groups", torch.full((rows,), UNFILLED, dtype=torch.int64))
            self.register_buffer("bank_next", torch.zeros((), dtype=torch.int64))

    @classmethod
    def published(cls, beta: float = 0.1, **options: Any) -> IHPCLoss:
        """The form of the authors' code (recovered from their compiled files): the positive's logit is damped by 1 - β.

            L_i = log( e^{(1-β) l_i+} + Σ_{n∈N(i)} e^{l_in} ) - (1-β) l_i+,      unweighted mean

        Options are the constructor's without hardness, which has no part in it. ValueError unless 0 <= beta < 1.
        """
        below_one("beta", beta)
        if "hardness" in options:
            raise TypeError(f"the published form has no hardness, got hardness={options['hardness']}")
        loss = cls(hardness=0.0, **options)
        loss.beta = float(beta)
        return loss

    def forward(self, view1: Tensor, view2: Tensor, groups: Tensor | None = None) -> Tensor:
        """view1, view2 [N, D]: row i of both shows image i.

        groups [N]: pairs of one group but different images are neither positive nor negative (slices of one plane of
        different patients look alike: as negatives they would be false).
        """
        if self.memory_bank is None:
            return ihpc_loss(view1, view2, groups, **self.options)
        # Packing copies what it reads, so the rows may be replaced before the backward pass.
        loss = ihpc_loss(view1, view2, groups, **self.options, bank=self.bank, bank_groups=self.bank_groups)
        if self.training:
            self._enqueue(view2, groups)
        return loss

    @torch.no_grad()
    def _enqueue(self, view: Tensor, groups: Tensor | None) -> None:
        """Write the newest rows over the oldest."""
        rows = self.bank.shape[0]
        view = view[-rows:].to(self.bank.dtype)
        if self.normalize:
            view = torch.nn.functional.normalize(view, dim=1)
        slots = (self.bank_next + torch.arange(view.shape[0], device=view.device)) % rows
        newest = torch.full_like(slots, NO_GROUP) if groups is None else groups.reshape(-1)[-rows:].to(slots)
        # A step that overflowed in half precision is skipped by the scaler; its rows must not stay as keys.
        sound = view.isfinite().all(1)
        newest = torch.where(sound, newest, UNFILLED)
        view = torch.where(sound[:, None], view, 0.0)
        self.bank.index_copy_(0, slots, view)
        self.bank_groups.index_copy_(0, slots, newest)
        self.bank_next.copy_((self.bank_next + view.shape[0]) % rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, memory_bank={self.memory_bank}"
