"""From the losses of anchors to the result: sums, means, means of group means, softmax weights, over ranks too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.distributed import gather_labels, gather_values, total
from hpcloss.plan.partition import partition


def reduce(
    loss: Tensor,
    counted: Tensor | None,
    reduction: str,
    order: Tensor | None = None,
    labels: Tensor | None = None,
    regions: Tensor | None = None,
    *,
    gather: bool = False,
) -> Tensor:
    """Reduce the losses of anchors to the result of a loss function.

    The weights of anchors come from integer counts, so the result is deterministic.

    Args:
        loss: Loss of each anchor `[N]`, 0 where it does not count.
        counted: Whether each anchor counts `[N]`. None: all count.
        reduction: "mean" over counted anchors, "class" (mean of class means), "region" (mean of the means of
            `regions`), "sum" or "none".
        order: Place of each anchor among the labels `[N]`. None: its own number.
        labels: Labels of any shape. They give the classes for "class" and the shape of the result for "none".
        regions: Region of each anchor `[N]`, for "region".
        gather: Reduce over the anchors of all ranks.

    Returns:
        The loss, 0-dim. For "none" the losses in the shape of `labels`, or `[N]` without labels.

    Examples:
        >>> import torch
        >>> from hpcloss.losses.reduction import reduce
        >>> reduce(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]), "mean")
        tensor(2.)
    """
    places = loss if labels is None else labels
    if reduction == "none":
        return loss if order is None else loss.new_zeros(places.numel()).index_add(0, order, loss).view(places.shape)
    group = places.reshape(-1)[order] if reduction == "class" else regions
    if group is not None and gather:
        everyone = gather_labels(group, _or_all(counted, loss))
        weight = group_weight(everyone.labels, everyone.regions == 1)[everyone.own]
        return total((loss * weight.to(loss.dtype)).sum())
    if group is not None:
        return (loss * group_weight(group, _or_all(counted, loss)).to(loss.dtype)).sum()
    if reduction == "mean" and counted is None and not gather and loss.numel():
        return loss.mean()
    summed = sum_of(loss, gather)
    return summed if reduction == "sum" else summed / sum_of(_or_all(counted, loss), gather).clamp(min=1)


def _or_all(counted: Tensor | None, loss: Tensor) -> Tensor:
    return torch.ones_like(loss, dtype=torch.bool) if counted is None else counted


def sum_of(values: Tensor, gather: bool) -> Tensor:
    """The sum of values `[N]`, with `gather` over all ranks."""
    return total(values.sum()) if gather else values.sum()


def number_of(counted: Tensor | None, loss: Tensor, gather: bool) -> Tensor | int:
    """The number of counted anchors, with `gather` of all ranks. None: all anchors count."""
    if counted is None and not gather:
        return loss.numel()
    return sum_of(_or_all(counted, loss), gather)


def softmax(exponents: Tensor, counted: Tensor | None, gather: bool) -> Tensor:
    """Softmax over the counted anchors `[N]`, with `gather` over those of all ranks.

    If no anchor counts, the result is finite and has no meaning.
    """
    if counted is None and not gather:
        return torch.softmax(exponents, 0)
    exponents = exponents if counted is None else torch.where(counted, exponents, -math.inf)
    everyone, own = gather_values(exponents, -math.inf) if gather else (exponents, None)
    weights = torch.softmax(torch.where((everyone != -math.inf).any(), everyone, 0.0), 0)
    return weights if own is None else weights[own]


def group_weight(ids: Tensor, counted: Tensor) -> Tensor:
    """Weights of a mean of group means `[N]`: 1 / (groups with a counted anchor · counted anchors of the group)."""
    order, groups = partition(ids)
    start, end = groups.pos_start, groups.pos_end
    seen = torch.nn.functional.pad(torch.cumsum(counted[order], 0), (1, 0))
    members = seen[end] - seen[start]
    present = ((start == groups.self_pos) & (members > 0)).sum()
    weight = torch.where(members > 0, 1.0 / (members * present).clamp(min=1).double(), 0.0)
    return torch.empty_like(weight).scatter_(0, order.long(), weight)
