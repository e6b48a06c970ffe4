"""Losses of a batch that several ranks hold together, as `gather=True` computes them: keys and sums of every rank.

Each rank contrasts its own anchors with the rows of all ranks, and returns the value of the whole batch. The gradient
of a key is the sum over ranks, and each rank's part is multiplied by the world size: so the mean over ranks that
DistributedDataParallel makes of the parameters' gradients is the gradient of the whole batch.

* Every rank calls the loss and its backward pass, whatever its shard holds: nothing, or ignored pixels alone. Batches
  may differ in length; feature maps have one size where regions are pooled over the batch.
* Labels, groups and regions mean the same on every rank; images and `partner` are those of the rank. So are random
  samples (as many per class from each rank), memory banks, queues and balanced assignments. The ranks draw the same
  `max_regions`, with the generator of the first, unless regions are of one image.
* Reduction "none" stays local, and so does its gradient's scale: multiply by the world size what is made of it.
* A learnable temperature is one parameter among others: its gradient must be averaged over ranks too.
* Without a process group, or alone in it, gather=True changes nothing.

Costs, with W ranks of at most N rows of D channels. A rank receives (W - 1) N D elements of the rows' dtype and
16 (W - 1) N bytes of labels, and on the way back (W - 1) N D fp32 numbers (float64 for float64). It keeps its rows and
all keys, (W + 1) N D elements; fetching the keys takes W N D more for a moment. In backward at most 2 (W + 1) N D fp32
numbers come to that, the gradients of rows and keys by the two terms of a loss; later 3 W N D in their place, the keys'
gradient as computed, in the order of ranks, as received. The host waits, for the numbers of rows: the sizes of tensors
follow from them. Compiled code is interrupted here.
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
    """`torch.compiler.disable`, but when it is called: it imports the compiler, with Triton and NumPy."""

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
    """Whether keys are to be gathered and there are other ranks that have some."""
    return gather and world_size() > 1


class Gathered(NamedTuple):
    """Labels of the rows of all ranks, M = W * most: those of rank r from r * most on, padded to the most of any rank.

    labels [M]; regions [M], -1 for rows that are dead or padding; own [N]: where the rows of this rank are.
    """

    labels: Tensor
    regions: Tensor
    own: Tensor
    most: int

    @_uncompiled
    def keys(self, rows: Rows, order: Tensor) -> Rows:
        """The rows of all ranks in this order [M], a permutation. A row's gradient is the sum over ranks, in fp32."""
        data = _all_gather(rows.data, self.most, 0).index_select(0, order)
        companion = torch.zeros((), dtype=rows.companion.dtype, device=data.device).expand(data.shape)
        return Rows(data, _FromAll.apply(rows.companion, companion, order.long(), self.most), rows.backend)


@_uncompiled
def gather_labels(labels: Tensor, regions: Tensor | None = None, num_regions: int = 1) -> Gathered:
    """Exchange the labels and regions [N] of rows. ValueError where ranks differ in their number of regions."""
    counts = _numbers(labels.device, labels.numel(), num_regions)
    _refuse_different([regions_there for _, regions_there in counts])
    # At least one row of padding: backends of torch.distributed need not know empty tensors.
    most = max(1, *(rows for rows, _ in counts))
    regions = torch.zeros_like(labels) if regions is None else regions
    everyone = _all_gather(torch.stack([labels.long(), regions.long()], 1), most, -1)
    own = torch.arange(labels.numel(), device=labels.device) + dist.get_rank() * most
    return Gathered(everyone[:, 0], everyone[:, 1], own, most)


@_uncompiled
def check_same_regions(device: torch.device, num_regions: int) -> None:
    """ValueError where ranks differ in their number of regions."""
    _refuse_different([regions_there for (regions_there,) in _numbers(device, num_regions)])


def _refuse_different(num_regions: list[int]) -> None:
    if len(set(num_regions)) > 1:
        raise ValueError(
            f"gather=True needs the same number of regions on every rank (feature maps of one size), got {num_regions}"
        )


def gather_keys(rows: Rows, pairs: Pairs, labels: Tensor) -> tuple[Pairs, Rows]:
    """The anchors of `pairs`, a partition of the rows of this rank, against the rows of all ranks.

    labels [N]: of the rows. Regions are those of `pairs`, by number; `self_pos` finds the anchors among the keys. Rows
    that `pairs` has as keys only, background, are keys like any other class here.
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
    """Numbers [N] of all ranks [M], each with the sum over ranks as gradient; and the places of the own ones [N]."""
    most = max(1, *(count for (count,) in _numbers(values.device, values.numel())))
    everyone = _all_gather(values.detach(), most, padding)
    own = torch.arange(values.numel(), device=values.device) + dist.get_rank() * most
    return _FromAll.apply(values, everyone, None, most), own


@_uncompiled
def gather_vectors(vectors: Tensor) -> Tensor:
    """Vectors [N, D] of all ranks [M, D], in order of ranks and without gradient; each rank's are followed by zero rows
    where another has more."""
    return _all_gather(vectors.detach(), max(1, *(count for (count,) in _numbers(vectors.device, len(vectors)))), 0)


@_uncompiled
def total(part: Tensor) -> Tensor:
    """Sum over ranks. Its gradient with respect to the own part is multiplied by the world size, by which
    DistributedDataParallel divides."""
    return _Total.apply(part)


def distinct(ids: Tensor) -> Tensor:
    """Ids that no other rank has, equal where these are."""
    return ids * dist.get_world_size() + dist.get_rank()


@_uncompiled
def agree(largest: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The elementwise largest of the one tensor over ranks, and the other one of the first rank."""
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.broadcast(first, 0)
    return largest, first


def _numbers(device: torch.device, *own: int) -> list[list[int]]:
    """The numbers of every rank. The host waits for them: the sizes of tensors follow from them."""
    return _all_gather(torch.tensor([own], device=device), 1, 0).tolist()


def _all_gather(values: Tensor, most: int, padding: float) -> Tensor:
    """Values [N, ...] of every rank, each padded to `most` rows [W * most, ...]."""
    count, rest = values.shape[0], values.shape[1:]
    if count < most:
        values = torch.cat([values, values.new_full((most - count, *rest), padding)])
    everyone = values.new_empty(dist.get_world_size() * most, *rest)
    # Older torch knows it by another name.
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
        # Each rank adds up what the others send in order of ranks: bitwise repeatable, unlike most all-reductions.
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
