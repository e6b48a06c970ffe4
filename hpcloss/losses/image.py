"""Contrast of images: hard-positive (IHPC)."""

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

# The group of an empty slot of the bank.
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
    """The function of `IHPCLoss`: views and groups, then its options.

    Args:
        view1: `[N, D]`.
        view2: `[N, D]`.
        groups: `[N]`, as in `IHPCLoss.forward`.
        beta: β of `IHPCLoss.published`; `hardness` then has no effect. None: the weighted form.
        bank: Further negatives `[M, D]`, without gradient.
        bank_groups: Their groups `[M]`. A row with the smallest int64 plus 1 as its group is absent.
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
    counted = None  # without groups and bank all rows count, or none has a negative
    if plans:
        counted = functools.reduce(Tensor.add_, [plan.counts()[1] for plan in plans]) > 0
    # 0 without a negative: the log-sum-exp of an empty set is -inf.
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
    """The rows of both views against the bank.

    Without groups no image of the batch is in the bank. Anchors have the order of `two_views`: both sort the same
    groups stably.
    """
    if bank_groups is None:
        bank_groups = torch.full_like(bank[:, 0], NO_GROUP, dtype=torch.int64)
    if groups is None:
        groups = torch.zeros_like(view1[:, 0], dtype=torch.int64)
        bank_groups = torch.where(bank_groups == UNFILLED, UNFILLED, NO_GROUP)
    return partition_against(groups.repeat(2), bank_groups, ignore_index=(UNFILLED,))


class IHPCLoss(Loss):
    """Hard-positive contrast of two views of images (IHPC).

        L = Σ_i v_i [ log( e^{l_i+} + Σ_{n∈N(i)} e^{l_in} ) - l_i+ ],      v = softmax_i( -hardness · s_i+ )

    i runs over the 2N rows of both views. s_i+ is the cosine of row i and the other view of its image, and l_i+ = s_i+
    / temperature; l_in is the logit of rows i and n. N(i), the negatives, are the rows of other images, without those
    of i's group, and the embeddings of a queue. The weights v are constants in the gradient.

    The loss pulls the two views of an image together, and dissimilar views most. It pushes the rows of other images
    away. A row counts if it has a negative. With hardness 0 and no groups the loss is `NTXentLoss`.

    Source: Tang et al., "Hard positives oriented contrastive learning" (ISBI 2023; Pattern Recognition 2024), the image
    level. Their printed equation was not available to us: the weights are our reading of the abstract and the figure.
    The form of the authors' code is `IHPCLoss.published`.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        hardness: Exponent of the weights. 0: all rows have the same weight. Positive: images with dissimilar views
            weigh more.
        normalize: Divide each row by its L2 norm. False: s is the inner product.
        reduction: "mean" over counted rows under the weights v, "sum" (n times that, with n counted rows), or "none"
            (`[2N]`, the rows of `view1` first; their mean over the counted rows is the loss).
        gather: On several processes, contrast with the rows of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> view1 = view2 = torch.eye(2)
        >>> loss = hpcloss.IHPCLoss(temperature=1.0, hardness=1.0)(view1, view2)
        >>> round(loss.item(), 4)  # log(e + 2) - 1
        0.5514
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
        """The form of the authors' code, which damps the logit of the positive.

            L_i = log( e^{(1-β) l_i+} + Σ_{n∈N(i)} e^{l_in} ) - (1-β) l_i+

        The loss is the mean of L_i without weights. Source: recovered from the compiled files of Tang et al. (ISBI
        2023).

        Args:
            beta: β in the equation, in [0, 1).
            **options: Options of `IHPCLoss` but `hardness`.

        Returns:
            The loss module.

        Raises:
            ValueError: beta is outside [0, 1).
            TypeError: beta is not a number, or `hardness` is given.
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
        """Compute the loss of two views.

        Args:
            view1: `[N, D]`, any float dtype. Row i shows image i.
            view2: `[N, D]`. Row i shows image i too.
            groups: `[N]`, integers. Different images of one group are neither positives nor negatives, for example
                slices of one plane of different patients. None: every image has its own group.
            queue: An `EmbeddingQueue` of one class, as further negatives without gradient. With `groups` it must keep
                groups. The loss reads the queue and does not write to it: call `queue.enqueue(view2, groups=groups)`
                after backward.

        Returns:
            The loss in fp32 (float64 for float64 views): 0-dim, or `[2N]` for `reduction="none"`.
        """
        loss = unchecked(ihpc_loss)
        if queue is None:
            return loss(view1, view2, groups, **self.options)
        bank, bank_groups = _rows_of(queue, groups)
        return loss(view1, view2, groups, **self.options, bank=bank, bank_groups=bank_groups)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Ignore the memory bank that older versions of this loss kept, with a warning."""
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
    """The slots of a queue [K, D] and their groups [K], `UNFILLED` for an empty slot."""
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"queue must be an EmbeddingQueue, got {type(queue).__name__}")
    if queue.num_classes != 1:
        raise ValueError(f"queue must have one class, got num_classes={queue.num_classes}")
    if groups is not None and queue.groups is None:
        raise ValueError("queue must keep groups where groups are given: use EmbeddingQueue(..., groups=True)")
    slot = torch.arange(queue.size, device=queue.filled.device)
    of_slots = torch.full_like(slot, NO_GROUP) if queue.groups is None else queue.groups[0]
    return queue.embeddings[0], torch.where(slot < queue.filled, of_slots, UNFILLED)
