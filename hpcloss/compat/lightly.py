"""lightly's `NTXentLoss`: two views of a batch (SimCLR), or a batch against a memory bank (MoCo)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcloss.checks import check_vectors
from hpcloss.compat.base import PeerLoss, check_vector_options
from hpcloss.distributed import gather_vectors, has_peers
from hpcloss.losses.reduction import reduce
from hpcloss.losses.vectors import infonce_loss, ntxent_loss
from hpcloss.memory import EmbeddingQueue
from hpcloss.operators import statistics_dtype


class NTXentLoss(PeerLoss):
    """NT-Xent with the signature of lightly's `NTXentLoss`, memory bank included.

        without a bank:  L_i = -log( e^{l_i+} / Σ_{j≠i} e^{l_ij} )
        with a bank:     L_i = -log( e^{l_i+} / ( e^{l_i+} + Σ_b e^{l_ib} ) )

    l_i+ is the cosine of row i and the other view of its image, divided by the temperature. Without a bank i and j run
    over the rows of both views. With a bank i runs over the rows of `out0` and b over the rows of the bank.

    The bank starts with random unit rows. A call reads it first and then writes `out1` to it, if `out0` requires a
    gradient, in training and in evaluation. The bank moves to the device of the embeddings.

    Source: Chen et al. (ICML 2020), eq. 1; with a bank He et al., MoCo (CVPR 2020), eq. 1.

    Args:
        temperature: A number of at least 1e-8, or a tensor with one element.
        memory_bank_size: (rows, D) of the bank; 0: no bank. A number of rows alone gives a warning: D is then taken
            from the first batch, or from a `state_dict` that is loaded before it.
        gather_distributed: On several processes, the loss of the whole batch. Without a bank the rows of all ranks are
            keys. A bank gets the rows of all ranks.

    Attributes:
        memory_bank: An `EmbeddingQueue`, None, or the number of rows while D is not known.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.lightly import NTXentLoss
        >>> out0 = out1 = torch.eye(2)
        >>> round(NTXentLoss(temperature=1.0)(out0, out1).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    lacks = ("cross_entropy", "eps")
    memory_bank: EmbeddingQueue | int | None

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_vector_options(temperature)
        if not isinstance(temperature, Tensor) and temperature < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        if gather_distributed and not dist.is_available():
            raise ValueError(f"gather_distributed must be False without torch.distributed, got {gather_distributed}")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = None
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        shaped = len(size) == 2 or size == (0,) or isinstance(memory_bank_size, int)
        if any(extent < 0 for extent in size) or not shaped:
            raise ValueError(f"memory_bank_size must be (rows, dim), or 0 for none, got {memory_bank_size}")
        if size[0] and len(size) == 1:
            warnings.warn(
                f"memory_bank_size={size[0]} leaves the dimension to the first batch; pass ({size[0]}, dim) to have the"
                " bank in state_dict from the start",
                stacklevel=2,
            )
            self.memory_bank = size[0]
        elif size[0]:
            self.memory_bank = _random_bank(*size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Compute the loss of two views.

        Args:
            out0: `[N, D]`. Row i shows image i.
            out1: `[N, D]`. Row i shows image i too.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 embeddings or a float64 bank).
        """
        if self.memory_bank is None:
            return ntxent_loss(out0, out1, self.temperature, gather=self.gather_distributed)
        check_vectors("out0", out0)
        check_vectors("out1", out1, like=out0, same_length=True)
        if isinstance(self.memory_bank, int):
            self.memory_bank = _random_bank(self.memory_bank, out1.shape[1]).to(statistics_dtype(out1.dtype))
        if self.memory_bank.embeddings.device != out1.device:
            self.memory_bank.to(out1.device)
        bank = self.memory_bank.embeddings[0]
        dtype = torch.promote_types(out0.dtype, bank.dtype)
        # Packing copies what it reads, so the bank may be written before the backward pass.
        loss = infonce_loss(out0.to(dtype), out1.to(dtype), bank.to(dtype), self.temperature, reduction="none")
        gather = has_peers(self.gather_distributed)
        if out0.requires_grad:
            _enqueue(self.memory_bank, gather_vectors(out1) if gather else out1)
        return reduce(loss, torch.ones_like(loss, dtype=torch.bool), "mean", gather=gather)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "memory_bank" and isinstance(value, EmbeddingQueue):
            # Every row is a negative. An empty one would have cosine 0.
            if int(value.filled[0]) < value.size:
                raise ValueError(f"memory_bank must be full, got {int(value.filled[0])} rows of {value.size}")
        elif name == "memory_bank" and value is not None and not isinstance(value, int):
            raise TypeError(f"memory_bank must be an EmbeddingQueue, a number of rows or None, got {value!r}")
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Children are loaded after this. A bank that waits for its first batch is built for the saved one.
        saved = state_dict.get(f"{prefix}memory_bank.embeddings")
        if isinstance(self.memory_bank, int) and saved is not None:
            self.memory_bank = _random_bank(self.memory_bank, saved.shape[-1]).to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _random_bank(rows: int, dim: int) -> EmbeddingQueue:
    bank = EmbeddingQueue(1, rows, dim)
    _enqueue(bank, torch.randn(rows, dim))
    return bank


def _enqueue(bank: EmbeddingQueue, rows: Tensor) -> None:
    bank.enqueue(rows.detach(), torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
