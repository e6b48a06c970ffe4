"""The mean of <anchor, positive> without pairs: with equal weights the sum of the positives is enough.

There are three ways to get the sums. An anchor with one positive has its sum. Consecutive anchors of one class share
one sum. Otherwise sums of intervals are differences of prefix sums; positives must then be symmetric (self-contrast).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import finite_mass
from hpcloss.backends.blockwise.tiles import run_edges
from hpcloss.plan.partition import Intervals

ROWS = 1 << 12  # rows gathered at a time
PIECE = 1 << 16  # elements of a temporary, instead of a float64 copy of all rows
NAN = float("nan")
Rows = slice | Tensor  # some rows: consecutive, or by their numbers


def linear_mean(anchors: Tensor, keys: Tensor | None, mass: Tensor, at: Intervals) -> Tensor | None:
    """Mean over the positives of each anchor [N], 0 without any. None if it needs the pairs.

    mass [N]: the logarithm of the number of positives.
    """
    others = anchors if keys is None else keys
    if at_most_one(mass):
        return mean_of_one(anchors, others, mass, at)
    out = anchors.new_zeros(anchors.shape[0])
    runs = _long_runs(mass, at)
    if runs is not None:
        for i0, i1, p0, p1 in runs:
            torch.mv(anchors[i0:i1], others[p0:p1].sum(0), out=out[i0:i1])
        if keys is None:
            out -= torch.linalg.vector_norm(anchors, dim=1).square_() * at.self_is_positive()
        else:
            for i, j in _selves(at):
                out[i] -= (anchors[i] * keys[j]).sum(1)
    elif keys is not None or _refuses_prefix_sums(anchors):
        return None
    else:
        for part in _columns(anchors):
            out += (part * _positive_sums(part, at)).sum(1)
    return out.mul_(torch.exp(-finite_mass(mass)))


def mean_of_one(anchors: Tensor, keys: Tensor, mass: Tensor, at: Intervals) -> Tensor:
    """The same if no anchor has two positives."""
    out = anchors.new_zeros(anchors.shape[0])
    for i, j in _partners(mass, at):
        out[i] = torch.linalg.vecdot(anchors[i], keys.index_select(0, j))
    return out


def linear_mean_backward(
    grad: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    mass: Tensor,
    at: Intervals,
    needs_anchors: bool,
    needs_keys: bool,
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients of anchors and keys (one sum in self-contrast). `grad` [N] must be 0 for rows without positives."""
    others = anchors if keys is None else keys
    per_pair = grad * torch.exp(-finite_mass(mass))
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None

    def add(pairs: Iterator[tuple[Rows, Tensor]], sign: int) -> None:
        for i, j in pairs:
            factor = (per_pair[i] if sign > 0 else -per_pair[i])[:, None]
            if d_anchors is not None and isinstance(i, Tensor):
                d_anchors.index_add_(0, i, others.index_select(0, j) * factor)
            elif d_anchors is not None:
                d_anchors[i].addcmul_(others.index_select(0, j), factor)
            if d_keys is not None:
                d_keys.index_add_(0, j, anchors[i] * factor)

    if at_most_one(mass):
        add(_partners(mass, at), 1)
    elif (runs := _long_runs(mass, at)) is not None:
        for i0, i1, p0, p1 in runs:
            if d_anchors is not None:
                d_anchors[i0:i1].addr_(per_pair[i0:i1], others[p0:p1].sum(0))
            if d_keys is not None:
                d_keys[p0:p1] += torch.mv(anchors[i0:i1].T, per_pair[i0:i1])
        if keys is not None:
            add(_selves(at), -1)
        elif d_anchors is not None:
            d_anchors.addcmul_(anchors, (per_pair * at.self_is_positive())[:, None], value=-2)
    elif keys is not None or _refuses_prefix_sums(anchors):
        return None
    elif d_anchors is not None:
        for part, d_part in zip(_columns(anchors), _columns(d_anchors)):
            # A pair counts once for anchor i and, if j is an anchor too, once for anchor j.
            d_part += _positive_sums(part, at).mul_(per_pair[:, None])
            d_part += _positive_sums(part * per_pair[:, None], at)
    return d_anchors, None if keys is None else d_keys


def at_most_one(mass: Tensor) -> bool:
    """Whether no anchor has two positives, as far as the host may read it."""
    return mass.device.type == "cpu" and bool((mass <= 0).all())


def _partners(mass: Tensor, at: Intervals) -> Iterator[tuple[Rows, Tensor]]:
    """Anchors with one positive and its key, some at a time; slices if all anchors have one."""
    there = mass == 0
    count = mass.shape[0]
    rows: list[Rows] = [slice(first, first + ROWS) for first in range(0, count, ROWS)]
    if not bool(there.all()):
        rows = list(there.nonzero()[:, 0].split(ROWS))
    for i in rows:
        start = at.pos_start[i]
        yield i, (start + (at.self_pos[i] == start)).long()


def _selves(at: Intervals) -> Iterator[tuple[Rows, Tensor]]:
    """Anchors in their own interval of positives and their own key, some at a time."""
    for i in at.self_is_positive().nonzero()[:, 0].split(ROWS):
        yield i, at.self_pos[i].long()


def _long_runs(mass: Tensor, at: Intervals) -> list[tuple[int, int, int, int]] | None:
    """(first row, end, first positive, end) of each run of rows with equal positives, if there are few; CPU only."""
    if at.pos_start.device.type != "cpu":
        return None
    edges = [0, *run_edges(at), at.pos_start.numel()]
    if len(edges) > 16 and (len(edges) - 1) * 64 > at.pos_start.numel():
        return None
    # Only anchors with a positive: values of dead rows, and of the keys in their intervals, must not enter.
    runs = [(i0, i1) for i0, i1 in zip(edges[:-1], edges[1:]) if i1 > i0 and bool((mass[i0:i1] >= 0).any())]
    return [(i0, i1, int(at.pos_start[i0]), int(at.pos_end[i0])) for i0, i1 in runs]


# -------------------------------------------------------------------------------------------------- prefix sums


def _refuses_prefix_sums(rows: Tensor) -> bool:
    """Whether only deterministic kernels may run on this GPU."""
    return rows.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()


def _columns(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(16, PIECE // max(rows.shape[0], 1)), 1)


def _positive_sums(rows: Tensor, at: Intervals) -> Tensor:
    """Sum of the positives of each row in self-contrast, by prefix sums in float64.

    Infinite and NaN rows stay in the intervals that hold them.
    """
    start, end = at.pos_start.long(), at.pos_end.long()
    broken = ~rows.isfinite().all(1)
    rows = torch.where(broken[:, None], 0.0, rows)
    broken_before = torch.nn.functional.pad(broken.cumsum(0), (1, 0))
    prefix = torch.nn.functional.pad(rows.double().cumsum(0), (0, 0, 1, 0))
    sums = (prefix[end] - prefix[start]).to(rows.dtype)
    sums -= rows * at.self_is_positive()[:, None]
    return sums.masked_fill_((broken_before[end] > broken_before[start])[:, None], NAN)
