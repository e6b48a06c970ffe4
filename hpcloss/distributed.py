"""Losses of a batch that several ranks hold together (`gather=True`): keys and sums of every rank.

Each rank contrasts its own anchors with the rows of all ranks and returns the value of the whole batch. The gradient of
a key is the sum over ranks. Each rank's gradient is multiplied by the world size, so the mean over ranks in
`DistributedDataParallel` gives the gradient of the whole batch.

* Every rank must call the loss and its backward pass, even with an empty shard or with ignored pixels alone. Batches
  may differ in length. Feature maps must have one size if regions are pooled over the batch.
* Labels, groups and regions mean the same on every rank. Images, `partner`, random samples, queues, banks and balanced
  assignments belong to the rank. All ranks choose the same `max_regions`, with the generator of the first rank, unless
  regions are of one image.
* `reduction="none"` stays local, and so does the scale of its gradient: multiply a loss that is made of it by the world
  size.
* A learnable temperature is a parameter: its gradient must be averaged over ranks too.
* Without a process group, or with one process, `gather=True` changes nothing.

Costs, for W ranks of at most N rows with D channels:

* Forward receives (W - 1) N D elements in the dtype of the rows, and 16 (W - 1) N bytes of labels. Backward receives as
  many fp32 numbers as forward receives elements (float64 for float64).
* A rank keeps its rows and all keys, (W + 1) N D elements. Gathering the keys takes W N D more for a moment.
* Backward adds at most 2 (W + 1) N D fp32 numbers: gradients of rows and keys by the two terms of a loss. Later 3 W N D
  replace them: the keys' gradient as computed, in the order of ranks, and as received.
* The host waits for the numbers of rows, because the sizes of tensors depend on them. Compiled code is interrupted
  here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hpcloss.operators import differentiable_once
from hpcloss.plan.partition import Pairs, partition
from hpcloss.primitives.rows import Rows


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, applied in the call. The import of it loads the compiler, with Triton and NumPy."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def has_peers(gather: bool) -> bool:
    """Whether a loss has to exchange anything: it gathers, and there are other ranks.

    Args:
        gather: The option of the loss.
    """
    return gather and world_size() > 1


class Gathered(NamedTuple):
    """Labels of the rows of all ranks, M = `W * most` of them. Those of rank r begin at `r * most` and are padded.

    Attributes:
        labels: `[M]`.
        regions: `[M]`, -1 for rows that are dead or padding.
        own: Places of the rows of this rank `[N]`.
        most: Largest number of rows of a rank, at least 1.
    """

    labels: Tensor
    regions: Tensor
    own: Tensor
    most: int

    @_uncompiled
    def keys(self, rows: Rows, order: Tensor) -> Rows:
        """The rows of all ranks. The gradient of a row is the sum over ranks, in fp32.

        Args:
            rows: Packed rows of this rank.
            order: A permutation `[M]`, the order of the result.
        """
        data = _all_gather(rows.data, self.most, 0).index_select(0, order)
        companion = torch.zeros((), dtype=rows.companion.dtype, device=data.device).expand(data.shape)
        return Rows(data, _FromAll.apply(rows.companion, companion, order.long(), self.most), rows.backend)


@_uncompiled
def gather_labels(labels: Tensor, regions: Tensor | None = None, num_regions: int = 1) -> Gathered:
    """Exchange the labels and regions of rows.

    Args:
        labels: Labels of the rows of this rank `[N]`.
        regions: Region of each row `[N]`, -1 for a dead row. None: all rows are in region 0.
        num_regions: Number of regions, the same on all ranks.

    Returns:
        `Gathered`: the labels and regions of all ranks, and the places of the own rows.

    Raises:
        ValueError: The number of regions differs between ranks.
    """
    counts = _numbers(labels.device, labels.numel(), num_regions)
    _refuse_different([regions_there for _, regions_there in counts])
    # At least one row of padding, because some backends of torch.distributed refuse empty tensors.
    most = max(1, *(rows for rows, _ in counts))
    regions = torch.zeros_like(labels) if regions is None else regions
    everyone = _all_gather(torch.stack([labels.long(), regions.long()], 1), most, -1)
    own = torch.arange(labels.numel(), device=labels.device) + dist.get_rank() * most
    return Gathered(everyone[:, 0], everyone[:, 1], own, most)


@_uncompiled
def check_same_regions(device: torch.device, num_regions: int) -> None:
    """Raise ValueError if the number of regions differs between ranks.

    Args:
        device: Device of the exchange.
        num_regions: Number of regions of this rank.
    """
    _refuse_different([regions_there for (regions_there,) in _numbers(device, num_regions)])


def _refuse_different(num_regions: list[int]) -> None:
    if len(set(num_regions)) > 1:
        raise ValueError(
            f"gather=True needs the same number of regions on every rank (feature maps of one size), got {num_regions}"
        )


def gather_keys(rows: Rows, pairs: Pairs, labels: Tensor) -> tuple[Pairs, Rows]:
    """The anchors of this rank against the rows of all ranks.

    A row that is a key only in `pairs` (background) is a key like any other here.

    Args:
        rows: Packed rows of this rank `[N, D]`.
        pairs: Their partition. The regions of all ranks match by number.
        labels: Labels of the rows `[N]`.

    Returns:
        The pairs of the own anchors and all keys, whose `self_pos` finds the anchors among the keys, and the keys.

    Raises:
        ValueError: The number of regions differs between ranks.
    """
    number, num_regions = torch.arange(labels.numel(), device=labels.device), pairs.intervals.anchor_end.numel()
    regions = torch.where(number < pairs.live(), pairs.intervals.region(), -1)
    everyone = gather_labels(labels, regions, num_regions)
    order, keys = partition(everyone.labels, everyone.regions, num_regions)
    place = torch.empty_like(order).scatter_(0, order.long(), keys.self_pos)[everyone.own]
    against = pairs.replace(
        pos_start=keys.pos_start[place],
        pos_end=keys.pos_end[place],
        self_pos=place,
        key_start=keys.key_start,
        key_end=keys.key_end,
    )
    return against, everyone.keys(rows, order)


@_uncompiled
def gather_values(values: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """Numbers of all ranks, each with the sum over ranks as its gradient.

    Args:
        values: Numbers of this rank `[N]`.
        padding: Value after the numbers of a rank that has fewer than another.

    Returns:
        The numbers of all ranks `[M]`, and the places of the own ones `[N]`.
    """
    most = max(1, *(count for (count,) in _numbers(values.device, values.numel())))
    everyone = _all_gather(values.detach(), most, padding)
    own = torch.arange(values.numel(), device=values.device) + dist.get_rank() * most
    return _FromAll.apply(values, everyone, None, most), own


@_uncompiled
def gather_vectors(vectors: Tensor) -> Tensor:
    """Vectors of all ranks `[M, D]` in the order of ranks, without gradient.

    Zero rows follow the vectors of a rank that has fewer than another.

    Args:
        vectors: Vectors of this rank `[N, D]`.
    """
    return _all_gather(vectors.detach(), max(1, *(count for (count,) in _numbers(vectors.device, len(vectors)))), 0)


@_uncompiled
def total(part: Tensor) -> Tensor:
    """Sum over ranks.

    The gradient of the own part is multiplied by the world size, because DistributedDataParallel divides by it.

    Args:
        part: The part of this rank.
    """
    return _Total.apply(part)


def distinct(ids: Tensor) -> Tensor:
    """Ids that no other rank has. Equal ids stay equal.

    Args:
        ids: Integers.
    """
    return ids * dist.get_world_size() + dist.get_rank()


@_uncompiled
def agree(largest: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The elementwise maximum of one tensor over ranks, and the other tensor of the first rank.

    Args:
        largest: Tensor whose maximum is taken, in place.
        first: Tensor that is replaced by that of the first rank, in place.
    """
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.broadcast(first, 0)
    return largest, first


def _numbers(device: torch.device, *own: int) -> list[list[int]]:
    """The numbers of every rank. The host waits for them, because sizes of tensors depend on them."""
    return _all_gather(torch.tensor([own], device=device), 1, 0).tolist()


def _all_gather(values: Tensor, most: int, padding: float) -> Tensor:
    """Values [N, ...] of every rank, each padded to `most` rows [W * most, ...]."""
    count, rest = values.shape[0], values.shape[1:]
    if count < most:
        values = torch.cat([values, values.new_full((most - count, *rest), padding)])
    everyone = values.new_empty(dist.get_world_size() * most, *rest)
    # Older torch has it under another name.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(everyone, values.contiguous())
    return everyone


class _FromAll(torch.autograd.Function):
    """Identity on gathered rows. Backward sends each rank the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, everyone: Tensor, order: Tensor | None, most: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.count, ctx.most = own.shape[0], most
        return everyone.view_as(everyone)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        if order is not None:
            grad = torch.empty_like(grad).index_copy_(0, order, grad)
        # Each rank adds the parts in the order of ranks. That is bitwise repeatable, unlike most all-reductions.
        grad, parts = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad)
        return parts.view(-1, ctx.most, *grad.shape[1:]).sum(0)[: ctx.count], None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        return (grad * dist.get_world_size(),)
