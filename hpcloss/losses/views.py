"""Rows that come in pairs, packed: two views of images, queries and their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.checks import check_vectors
from hpcloss.distributed import distinct, gather_keys
from hpcloss.plan.partition import Intervals, Pairs, paired, partition, two_by_two
from hpcloss.primitives.rows import Rows, pack


def gather_all(keys: Rows) -> tuple[Intervals, Rows]:
    """The keys of all ranks, and the intervals of each own key against them. `self_pos` is its row among them."""
    number = torch.arange(keys.data.shape[0], device=keys.data.device)
    one_class = torch.zeros_like(number)
    pairs, everyone = gather_keys(keys, partition(one_class), one_class)
    return pairs.intervals, everyone


def two_views(
    view1: Tensor, view2: Tensor, groups: Tensor | None, normalize: bool, backend: str, gather: bool
) -> tuple[Rows, Rows | None, Pairs, Pairs]:
    """The packed rows of both views, sorted by group, and their pairs.

    Args:
        view1: `[N, D]`.
        view2: `[N, D]`.
        groups: Group of each image `[N]`. None: each image is a group of its own, on all ranks.
        normalize: As in `pack`.
        backend: As in `pack`.
        gather: Take the rows of all ranks as keys.

    Returns:
        The rows; the keys, None if they are the rows; the pairs by group; the same pairs with the other view as the
            only positive.
    """
    check_vectors("view2", view2, like=view1, same_length=True)
    count, views = view1.shape[0], torch.cat([view1, view2])
    if groups is None and not gather:
        own = two_by_two(count, views.device)
        return (
            pack(views, own.order, own.live(), normalize=normalize, permutation=True, backend=backend),
            None,
            own,
            own,
        )
    if groups is None:
        groups = distinct(torch.arange(count, device=views.device))
    by_group = partition(groups.repeat(2))
    order = by_group.order.long()
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(2 * count, device=order.device))
    rows, keys = pack(views, by_group.order, normalize=normalize, permutation=True, backend=backend), None
    if gather:
        by_group, keys = gather_keys(rows, by_group, groups.repeat(2)[order])
    other_view = row_of[(order + count) % max(2 * count, 1)]
    return rows, keys, by_group, paired(by_group, by_group.intervals.self_pos[other_view])


def queries_and_keys(query: Tensor, positive: Tensor, pairs: Pairs, normalize: bool, backend: str) -> tuple[Rows, Rows]:
    """Queries and positive keys, packed in their own order."""
    order, live = pairs.order, pairs.live()
    rows = pack(query, order, live, normalize=normalize, permutation=True, backend=backend)
    return rows, pack(positive, order, live, normalize=normalize, permutation=True, backend=rows.backend)
