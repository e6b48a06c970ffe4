"""Masked pieces. Each has a defined value and a zero gradient for an empty mask, with no NaN on the way to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = (-100, -1, 255)


# Masked pieces. Each has a defined value and a zero gradient for an empty mask, with no NaN on the way to it.
def lse(x: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp of `x` over `mask` along the last axis, -inf where the mask is empty."""
    some = mask.any(-1)
    # An empty row takes a detour over zeros: the gradient of logsumexp at (-inf, ..., -inf) is NaN.
    x = torch.where(some.unsqueeze(-1), torch.where(mask, x, -math.inf), 0.0)
    return torch.where(some, torch.logsumexp(x, -1), -math.inf)


def softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax of `x` over `mask` along the last axis, 0 outside it and in rows where it is empty."""
    some = mask.any(-1, keepdim=True)
    x = torch.where(some, torch.where(mask, x, -math.inf), 0.0)
    return torch.where(some, torch.softmax(x, -1), 0.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), 0 at -inf. `F.softplus` is not used: it becomes the identity at 20, an error of 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))


def unit(x: Tensor, normalize: bool = True) -> Tensor:
    """Rows divided by their norm; a row of norm at most 1e-12 becomes the zero row and gets no gradient."""
    if not normalize:
        return x
    keep = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) > 1e-12
    safe = torch.where(keep, x, 1.0)
    return torch.where(keep, safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), 0.0)


def is_valid(labels: Tensor, ignore_index: int | Sequence[int]) -> Tensor:
    """Which labels [N] are not ignored."""
    ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)
    valid = torch.ones_like(labels, dtype=torch.bool)
    for value in ignored:
        valid &= labels != value
    return valid


def reduce(loss: Tensor, counted: Tensor, reduction: str, groups: dict[str, Tensor] | None = None) -> Tensor:
    """`loss` [N] is 0 where not `counted` [N]; `groups` names what else it may be averaged over: ids [N]."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum().clamp(min=1)
    groups = groups or {}
    if reduction not in groups:
        raise ValueError(f"reduction must be one of {', '.join(['mean', 'sum', 'none', *groups])}, got {reduction}")
    ids = groups[reduction]
    means = [loss[counted & (ids == g)].mean() for g in ids[counted].unique()]
    return torch.stack(means).mean() if means else loss.sum()
