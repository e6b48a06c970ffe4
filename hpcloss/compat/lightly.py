"""lightly's `NTXentLoss`: two views of a batch (SimCLR), or a batch against a memory bank (MoCo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpcloss.checks import check_vector_options
from hpcloss.distributed import gather_vectors, has_peers
from hpcloss.functional.arithmetic import reduce
from hpcloss.functional.supcon import infonce_loss, ntxent_loss
from hpcloss.memory import EmbeddingQueue


class NTXentLoss(nn.Module):
    """NT-Xent of Chen et al. (ICML 2020); with a bank the contrast of He et al. (MoCo, CVPR 2020), as lightly calls it.

    The bank starts with random unit rows; its rows are negatives alone, are read before they are written, and are
    written only if `out0` requires a gradient.

    Args:
        temperature: number of at least 1e-8, or a 0-dim tensor.
        memory_bank_size: (rows, D) of the bank; 0 for none.
        gather_distributed: the loss of the whole batch that several processes hold. Without a bank the rows of all are
            keys; a bank has the rows of all written into it.
    """

    memory_bank: EmbeddingQueue | None

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_vector_options(temperature, "mean")
        if not isinstance(temperature, Tensor) and temperature < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = None
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if any(extent < 0 for extent in size) or (size != (0,) and len(size) != 2):
            raise ValueError(f"memory_bank_size must be (rows, dim), or 0 for none, got {memory_bank_size}")
        if size[0]:
            self.memory_bank = EmbeddingQueue(1, *size)
            self._enqueue(torch.randn(size))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1 [N, D]: row i of both shows image i. With a bank, rows of out0 alone are anchors."""
        if self.memory_bank is None:
            return ntxent_loss(out0, out1, self.temperature, gather=self.gather_distributed)
        bank = self.memory_bank.embeddings[0]
        dtype = torch.promote_types(out0.dtype, bank.dtype)
        # Packing copies what it reads, so the bank may be written before the backward pass.
        loss = infonce_loss(out0.to(dtype), out1.to(dtype), bank.to(dtype), self.temperature, reduction="none")
        gather = has_peers(self.gather_distributed)
        if out0.requires_grad:
            self._enqueue(gather_vectors(out1) if gather else out1)
        return reduce(loss, torch.ones_like(loss, dtype=torch.bool), "mean", gather=gather)

    def _enqueue(self, rows: Tensor) -> None:
        if self.memory_bank is not None:
            self.memory_bank.enqueue(rows.detach(), torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
