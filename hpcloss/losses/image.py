"""Image-level contrast: hard-positive (IHPC)."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from hpcloss.arithmetic import merge, softplus
from hpcloss.checks import below_one, check_used, check_vectors
from hpcloss.distributed import has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import number_of, reduce, softmax, sum_of
from hpcloss.losses.views import two_views
from hpcloss.memory import NO_GROUP, EmbeddingQueue
from hpcloss.plan.labels import labels_of_vectors
from hpcloss.plan.partition import Pairs, partition_against
from hpcloss.primitives.one_positive import one_positive
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale

# The group of a row of the bank that does not exist yet.
UNFILLED = torch.iinfo(torch.int64).min + 1


@checked
def ihpc_loss(
    view1: Tensor,
    view2: Tensor,
    groups: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    hardness: float = 1.0,
    *,
    beta: float | None = None,
    bank: Tensor | None = None,
    bank_groups: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Image-level hard-positive contrast of two views; equations and arguments in `IHPCLoss`.

    beta: the published form instead of the reweighted one; hardness then has no part. bank [M, D]: further negatives,
    not differentiated;
    bank_groups [M]: their groups, of which those equal to `UNFILLED` mark rows that do not exist yet.
    """
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    owner = None if groups is None else labels_of_vectors("groups", view1, groups)
    rows, keys, by_group, own = two_views(view1, view2, owner, normalize, backend, gather)
    scale = Scale.of(temperature, rows, normalize)
    if groups is None:
        positive, negative = one_positive(rows, own, scale, keys=keys)
    else:
        positive, _ = pair_mean(rows, own, "logit", scale.unbounded(), keys=keys)
        negative = pair_lse(rows, by_group, "negatives", scale, keys=keys)
    plans = [] if groups is None else [by_group.intervals]
    if bank is not None:
        check_vectors("bank", bank, like=view1)
        pairs, order = _against_bank(owner, view1, bank, bank_groups)
        filled = pairs.intervals.key_end
        if check_finite:
            check_used(order, filled, bank=bank)
        bank_rows = pack(bank.detach(), order, filled, normalize=normalize, backend=rows.backend)
        negative = merge(negative, pair_lse(rows, pairs, "negatives", scale, keys=bank_rows))
        plans = [by_group.intervals, pairs.intervals]
    counted = None  # without groups and bank either every image has a negative or none
    if plans:
        counted = functools.reduce(Tensor.add_, [plan.counts()[1] for plan in plans]) > 0
    # 0 without a negative: the log-sum-exp of none is -inf.
    loss = softplus(negative - (positive if beta is None else (1 - beta) * positive))
    if beta is None and hardness:
        weights = softmax(positive.detach() * (-hardness / scale.value.detach()), counted, gather)
        if reduction == "mean":
            return sum_of(weights * loss, gather)
        loss = loss * (weights * number_of(counted, loss, gather))
    return reduce(loss, counted, reduction, own.order, gather=gather)


def _against_bank(
    groups: Tensor | None, view1: Tensor, bank: Tensor, bank_groups: Tensor | None
) -> tuple[Pairs, Tensor]:
    """The rows of both views against the bank, of which no image of the batch is a part unless there are groups.

    Anchors in the order of `two_views`: both partitions sort the same groups stably.
    """
    if bank_groups is None:
        bank_groups = torch.full_like(bank[:, 0], NO_GROUP, dtype=torch.int64)
    if groups is None:
        groups = torch.zeros_like(view1[:, 0], dtype=torch.int64)
        bank_groups = torch.where(bank_groups == UNFILLED, UNFILLED, NO_GROUP)
    return partition_against(groups.repeat(2), bank_groups, ignore_index=(UNFILLED,))


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
        normalize: L2-normalise the rows.
        reduction: "mean", "sum" or "none" ([2N], view1 first; the mean of them is the loss).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".
    """

    beta: float | None  # of the published form, else None

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        hardness: float = 1.0,
        *,
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

    @classmethod
    def published(cls, beta: float = 0.1, **options: Any) -> IHPCLoss:
        """The form of the authors' code (recovered from their compiled files): the positive's logit is damped by 1 - β.

            L_i = log( e^{(1-β) l_i+} + Σ_{n∈N(i)} e^{l_in} ) - (1-β) l_i+,      unweighted mean

        Options are the constructor's without hardness, which has no part in it. ValueError unless 0 <= beta < 1.
        """
        below_one("beta", beta)
        if "hardness" in options:
            raise TypeError(f"hardness must not be given to the published form, got {options['hardness']}")
        loss = cls(hardness=0.0, **options)
        loss.beta = float(beta)
        return loss

    def forward(
        self, view1: Tensor, view2: Tensor, groups: Tensor | None = None, queue: EmbeddingQueue | None = None
    ) -> Tensor:
        """view1, view2 [N, D]: row i of both shows image i.

        groups [N]: pairs of one group but different images are neither positive nor negative (slices of one plane of
        different patients look alike: as negatives they would be false).

        queue: embeddings of past batches as further negatives, without gradient; of one class, and with groups the
        queue must keep those of its embeddings. The loss reads it and never writes it:

            queue = EmbeddingQueue(1, size=4096, dim=128, groups=True)
            loss = contrast(view1, view2, groups, queue)
            loss.backward()
            queue.enqueue(view2, groups=groups)
        """
        loss = unchecked(ihpc_loss)
        if queue is None:
            return loss(view1, view2, groups, **self.options)
        bank, bank_groups = _rows_of(queue, groups)
        return loss(view1, view2, groups, **self.options, bank=bank, bank_groups=bank_groups)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Leaves out the memory bank that older versions of this loss kept, and says so."""
        found = [name for name in (f"{prefix}bank", f"{prefix}bank_groups", f"{prefix}bank_next") if name in state_dict]
        for name in found:
            del state_dict[name]
        if found:
            warnings.warn(
                f"IHPCLoss ignores {', '.join(found)} of the checkpoint: it no longer has a memory bank. Pass an"
                " EmbeddingQueue to the call; it starts empty.",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _rows_of(queue: EmbeddingQueue, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The slots of a queue [K, D] and their groups [K], `UNFILLED` for a slot that holds nothing."""
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"queue must be an EmbeddingQueue, got {type(queue).__name__}")
    if queue.num_classes != 1:
        raise ValueError(f"queue must have one class, got num_classes={queue.num_classes}")
    if groups is not None and queue.groups is None:
        raise ValueError("queue must keep groups where groups are given: use EmbeddingQueue(..., groups=True)")
    slot = torch.arange(queue.size, device=queue.filled.device)
    of_slots = torch.full_like(slot, NO_GROUP) if queue.groups is None else queue.groups[0]
    return queue.embeddings[0], torch.where(slot < queue.filled, of_slots, UNFILLED)
