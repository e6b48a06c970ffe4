"""Contrast of vectors: by labels, of two views, of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    VECTORS_IGNORED,
    check_used,
    check_vectors,
    checked,
    integers,
    labels_of_vectors,
)
from hpcloss.distributed import distinct, gather_keys, gather_labels, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce, softplus
from hpcloss.pack import Rows, pack
from hpcloss.pairs import pair_cross_entropy, pair_lse, pair_lse_both, pair_mean
from hpcloss.partition import Pairs, one_to_one, paired, partition, partition_against


@checked
def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    ignore_index: int | Sequence[int] = VECTORS_IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Supervised contrast of vectors; equations and arguments in `SupConLoss`."""
    check_vectors("embeddings", embeddings)
    labels = labels_of_vectors("labels", embeddings, labels)
    ignored = integers("ignore_index", ignore_index)
    backend, gather = resolve(backend, embeddings), has_peers(gather)
    key_rows = None
    if keys is not None:
        check_vectors("keys", keys, like=embeddings)
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels go together, got only one of them")
    if keys is not None and key_labels is not None:
        key_labels = labels_of_vectors("key_labels", keys, key_labels)
        pairs, key_order = partition_against(labels, key_labels, ignore_index=ignored)
        if check_finite:
            check_used(key_order, pairs.key_end, keys=keys)
        key_rows = pack(keys, key_order, pairs.key_end, normalize=normalize, permutation=True, backend=backend)
        if gather:
            alive = torch.arange(key_order.numel(), device=labels.device) < pairs.key_end
            everyone = gather_labels(key_labels[key_order], alive.long() - 1)
            pairs, key_order = partition_against(labels, everyone.labels, everyone.regions, ignore_index=ignored)
            key_rows = everyone.keys(key_rows, key_order)
    else:
        pairs = partition(labels, ignore_index=ignored)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), embeddings=embeddings)
    rows = pack(embeddings, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
    if gather and keys is None:
        pairs, key_rows = gather_keys(rows, pairs, labels[pairs.order])
    scale, bound = inverse_temperature(temperature, rows, normalize)
    counted = pairs.counted()
    if form == "out":
        loss, _, _ = pair_cross_entropy(rows, pairs, scale, keys=key_rows, scale_bound=bound, backend=backend)
    else:
        own, negative = (
            pair_lse(rows, pairs, rule, scale, keys=key_rows, scale_bound=bound, backend=backend)
            for rule in ("positives", "negatives")
        )
        positives, _ = pairs.counts()
        # log(P + N) - log(P / n), without a difference of two large numbers. Not -inf minus -inf where no positive is.
        loss = softplus(negative - torch.where(counted, own, 0.0)) + positives.clamp(min=1).to(own.dtype).log()
        loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


@checked
def ntxent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views; equation and arguments in `NTXentLoss`."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, by_image, own, backend = two_views(view1, view2, images(view1, gather), normalize, backend, gather)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    negative = pair_lse(rows, own, "negatives", scale, keys=keys, scale_bound=bound, backend=backend)
    loss = softplus(negative - pair_mean(rows, own, "logit", scale, keys=keys, backend=backend)[0])
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction, own.order, gather=gather)


@checked
def infonce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of each query with its positive key; equations and arguments in `InfoNCELoss`."""
    if symmetric and negatives is not None:
        raise ValueError("symmetric=True has no meaning with negatives of the queries' own")
    check_vectors("query", query)
    check_vectors("positive", positive, like=query, same_length=True)
    if check_finite:
        check_used(temperature=temperature, query=query, positive=positive, negatives=negatives)
    backend, gather = resolve(backend, query), has_peers(gather)
    pairs = one_to_one(query.shape[0], query.device)
    rows = pack(query, pairs.order, normalize=normalize, backend=backend)
    keys = pack(positive, pairs.order, normalize=normalize, backend=backend)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    own, _ = pair_mean(rows, pairs, "logit", scale, keys=keys, backend=backend)
    if negatives is not None:
        check_vectors("negatives", negatives, like=query)
        order = torch.arange(negatives.shape[0], device=query.device)
        others = pack(negatives, order, normalize=normalize, backend=backend)
        whole = pairs.replace(key_end=torch.full_like(pairs.key_end, negatives.shape[0]))
        if gather:
            met, others = gather_all(others)
            whole = pairs.replace(key_start=met.key_start, key_end=met.key_end)
        lse = pair_lse(rows, whole, "every", scale, keys=others, scale_bound=bound, backend=backend)
        loss = softplus(lse - own)
    elif symmetric and not gather:
        of_query, of_key = pair_lse_both(rows, keys, pairs, "negatives", scale, scale_bound=bound, backend=backend)
        loss = (softplus(of_query - own) + softplus(of_key - own)) / 2
    else:
        all_keys = keys
        if gather:
            met, all_keys = gather_all(keys)
            place = met.self_pos  # of the own positive among the keys of all ranks
            pairs = pairs.replace(pos_start=place, pos_end=place + 1, key_start=met.key_start, key_end=met.key_end)
        of_query = pair_lse(rows, pairs, "negatives", scale, keys=all_keys, scale_bound=bound, backend=backend)
        loss = softplus(of_query - own)
        if symmetric:
            _, all_rows = gather_all(rows)
            of_key = pair_lse(keys, pairs, "negatives", scale, keys=all_rows, scale_bound=bound, backend=backend)
            loss = (loss + softplus(of_key - own)) / 2
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction, gather=gather)


@checked
def hard_negative_nce_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views with hard negatives; equation and arguments in `HardNegativeNCELoss`."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, by_image, own, backend = two_views(view1, view2, images(view1, gather), normalize, backend, gather)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    positive = pair_mean(rows, own, "logit", scale, keys=keys, backend=backend)[0]

    def lse(factor: float) -> Tensor:
        most = None if bound is None else factor * bound
        return pair_lse(rows, by_image, "negatives", factor * scale, keys=keys, scale_bound=most, backend=backend)

    negatives = by_image.counts()[1]
    counted, log_count = negatives > 0, negatives.clamp(min=1).to(positive.dtype).log()
    # Σ v e^l = N Σ e^{(1 + beta) l} / Σ e^{beta l}; not -inf minus -inf where there is no negative.
    hard = torch.where(counted, lse(1 + beta), 0.0)
    negative = log_count + hard - torch.where(counted, lse(beta), 0.0) if beta else hard
    if tau_plus:
        # The share of false negatives, as a logarithm; from 1 on nothing is left, and the lowest value holds.
        share = math.log(tau_plus) + log_count + positive - negative
        some_left = ~(share >= -4 * torch.finfo(share.dtype).eps)  # NaN stays NaN
        left = negative + torch.log1p(-torch.where(some_left, share, -1.0).exp()) - math.log1p(-tau_plus)
        lowest = log_count - scale
        negative = torch.where(some_left, torch.maximum(left, lowest), lowest)
    loss = torch.where(counted, softplus(negative - positive), 0.0)
    return reduce(loss, counted, reduction, own.order, gather=gather)


def images(views: Tensor, gather: bool) -> Tensor:
    """A number for each image of a batch [N], on all ranks with `gather`."""
    number = torch.arange(views.shape[0], device=views.device)
    return distinct(number) if gather else number


def gather_all(keys: Rows) -> tuple[Pairs, Rows]:
    """The keys of all ranks, and each own key against them; `self_pos` is its place among them."""
    number = torch.arange(keys.data.shape[0], device=keys.data.device)
    one_class = torch.zeros_like(number)
    return gather_keys(keys, partition(one_class), one_class)


def two_views(
    view1: Tensor, view2: Tensor, groups: Tensor, normalize: bool, backend: str, gather: bool
) -> tuple[Rows, Rows | None, Pairs, Pairs, str]:
    """The rows of both views, sorted by group, and the keys where they are not these; pairs by group, and the same with
    the other view as only positive."""
    check_vectors("view2", view2, like=view1, same_length=True)
    backend = resolve(backend, view1)
    by_group = partition(groups.repeat(2))
    order, count = by_group.order.long(), view1.shape[0]
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(2 * count, device=order.device))
    rows = pack(torch.cat([view1, view2]), by_group.order, normalize=normalize, permutation=True, backend=backend)
    keys = None
    if gather:
        by_group, keys = gather_keys(rows, by_group, groups.repeat(2)[order])
    own = paired(by_group, by_group.self_pos[row_of[(order + count) % max(2 * count, 1)]])
    return rows, keys, by_group, own, backend
