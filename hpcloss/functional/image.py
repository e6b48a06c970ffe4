"""Image-level contrast: hard-positive (IHPC)."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.checks import check_used, check_vectors, checked, labels_of_vectors
from hpcloss.distributed import has_peers
from hpcloss.functional.arithmetic import inverse_temperature, merge, reduce, softmax, softplus, sum_of
from hpcloss.functional.supcon import images, two_views
from hpcloss.pack import pack
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import partition_against

# Groups of a memory bank's rows: one that holds nothing yet, one that belongs to no group.
UNFILLED, NO_GROUP = torch.iinfo(torch.int64).min + 1, torch.iinfo(torch.int64).min + 2


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
    owner = images(view1, gather) if groups is None else labels_of_vectors("groups", view1, groups)
    rows, keys, by_group, own, backend = two_views(view1, view2, owner, normalize, backend, gather)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    negative = pair_lse(rows, by_group, "negatives", scale, keys=keys, scale_bound=bound, backend=backend)
    negatives = by_group.counts()[1]
    if bank is not None:
        check_vectors("bank", bank, like=view1)
        if bank_groups is None:
            bank_groups = torch.full_like(bank[:, 0], NO_GROUP, dtype=torch.int64)
        if groups is None:  # no image of the batch is in the bank, whatever its number
            bank_groups = torch.where(bank_groups == UNFILLED, UNFILLED, NO_GROUP)
        # Anchors in the order of `rows`: both partitions sort the same groups stably.
        bank_pairs, bank_order = partition_against(owner.repeat(2), bank_groups, ignore_index=(UNFILLED,))
        if check_finite:
            check_used(bank_order, bank_pairs.key_end, bank=bank)
        bank_rows = pack(bank.detach(), bank_order, bank_pairs.key_end, normalize=normalize, backend=backend)
        old = pair_lse(rows, bank_pairs, "negatives", scale, keys=bank_rows, scale_bound=bound, backend=backend)
        negative = merge(negative, old)
        negatives = negatives + bank_pairs.counts()[1]
    positive, _ = pair_mean(rows, own, "logit", scale, keys=keys, backend=backend)
    counted = negatives > 0
    factor = 1.0 if beta is None else 1 - beta
    loss = softplus(negative - factor * positive)
    if beta is None and hardness:
        exponent = -hardness * positive.detach() / scale.detach()
        loss = loss * (softmax(exponent, counted, gather) * sum_of(counted, gather))
    loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, own.order, gather=gather)
