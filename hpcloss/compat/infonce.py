"""info-nce-pytorch's `InfoNCE` and `info_nce`: queries, their positive keys, shared or own negative keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcloss.arithmetic import softplus
from hpcloss.checks import check_vectors
from hpcloss.compat.base import check_vector_options
from hpcloss.losses.reduction import reduce
from hpcloss.losses.vectors import infonce_loss
from hpcloss.operators import NORM_EPS, plain, statistics_dtype


class InfoNCE(nn.Module):
    """InfoNCE with the signature of info-nce-pytorch's `InfoNCE`.

        L_i = -log( e^{q_i·k_i/τ} / ( e^{q_i·k_i/τ} + Σ_m e^{q_i·n_m/τ} ) )

    q_i is query i, k_i its positive key, n_m a negative key and τ the temperature; all rows have unit length. Without
    negative keys the positive keys of the other queries are the negatives.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding" (2018), eq. 4, with
    cosines.

    Args:
        temperature: τ. A positive number, or a tensor with one element.
        reduction: "mean", "sum", or "none" (`[N]`).
        negative_mode: "unpaired": all queries share the negative keys. "paired": each query has its own.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.infonce import InfoNCE
        >>> query = positive_key = torch.eye(3)
        >>> round(InfoNCE(temperature=1.0)(query, positive_key).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    def __init__(self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"):
        super().__init__()
        _check_options(temperature, reduction, negative_mode)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Compute the loss of queries and their positive keys.

        Args:
            query: `[N, D]`.
            positive_key: `[N, D]`. Row i is the positive key of query i.
            negative_keys: `[M, D]` if unpaired, `[N, M, D]` if paired. None: the positive keys of the other queries.

        Returns:
            The loss in fp32 (float64 for float64 queries): 0-dim, or `[N]` for `reduction="none"`.
        """
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """info-nce-pytorch's `info_nce`, the function of `InfoNCE`: the inputs of its `forward`, then its options.

    Args:
        query: `[N, D]`.
        positive_key: `[N, D]`. Row i is the positive key of query i.
        negative_keys: `[M, D]` if unpaired, `[N, M, D]` if paired. None: the positive keys of the other queries.
        temperature: A positive number, or a tensor with one element.
        reduction: "mean", "sum", or "none" (`[N]`).
        negative_mode: "unpaired": all queries share the negative keys. "paired": each query has its own.

    Returns:
        The loss in fp32 (float64 for float64 queries): 0-dim, or `[N]` for `reduction="none"`.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.
    """
    _check_options(temperature, reduction, negative_mode)
    if negative_keys is None or negative_mode == "unpaired":
        return infonce_loss(query, positive_key, negative_keys, temperature, reduction=reduction)
    if negative_keys.dim() != 3 or len(negative_keys) != len(query) or negative_keys.shape[2] != query.shape[-1]:
        raise ValueError(
            f"paired negative_keys must have shape [N, M, D] for a query of {tuple(query.shape)},"
            f" got {tuple(negative_keys.shape)}"
        )
    check_vectors("query", query)
    check_vectors("positive_key", positive_key, like=query, same_length=True)
    # There is no matrix to stream: each row has its own keys, and logits take 1/D of their memory. No matmul either:
    # its backward pass would run in half precision under autocast.
    query, positive_key, negative_keys = (plain(x) for x in (query, positive_key, negative_keys))
    with torch.autocast(query.device.type, enabled=False):
        dtype = statistics_dtype(query.dtype)
        rows = _unit(query.to(dtype))
        if isinstance(temperature, Tensor):
            temperature = temperature.to(rows).reshape(())
        own = (rows * _unit(positive_key.to(dtype))).sum(1) / temperature
        keys = negative_keys.to(dtype)
        norm = keys.norm(dim=2)
        cosine = torch.where(norm > NORM_EPS, (keys * rows[:, None]).sum(2) / norm.clamp(min=NORM_EPS), 0.0)
        loss = softplus(torch.logsumexp(cosine / temperature, 1) - own)
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


def _unit(x: Tensor) -> Tensor:
    """Rows [N, D] of length 1. A row without a direction becomes zero and gets no gradient, as in `pack`."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > NORM_EPS, x / norm.clamp(min=NORM_EPS), 0.0)


def _check_options(temperature: float | Tensor, reduction: str, negative_mode: str) -> None:
    check_vector_options(temperature, reduction)
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
