"""Plans of every shape, which pairs each allows, and a comparison of a primitive with its dense form."""

import math
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcloss.losses.cells import against_cells, cells_of_regions
from hpcloss.plan.partition import Intervals, Pairs, one_to_one, paired, partition, partition_against
from hpcloss.plan.regions import Grid, grid_regions
from hpcloss.primitives.rows import Rows
from tests.tools.cases import choice, integers, rows, runs
from tests.tools.numerics import assert_exact

NOISE = 1e-13


class Plan(NamedTuple):
    pairs: Pairs
    num_keys: int | None  # None: self-contrast


def self_plan(n=40, regions=3, background=0, seed=0):
    """Several regions with background first and a dead tail."""
    labels, region = choice([0, 1, 1, 1, 2, 3, 255], n, seed=seed), integers(regions + 2, n, seed=seed + 1)
    return Plan(partition(labels, region, regions + 1, background=background, ignore_index=(255,)), None)


def long_plan(*lengths, background=None):
    return Plan(partition(runs(*lengths), background=background), None)


def paired_plan(n=20, groups=4):
    """Each row with one explicit positive anywhere in the order, as in two-view losses."""
    by_group = partition(integers(groups, n).repeat(2))
    order = by_group.order.long()
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(2 * n))
    return Plan(paired(by_group, row_of[(order + n) % (2 * n)]), None)


def near_and_far_pairs_plan():
    """Some explicit positives lie next to their anchor, others far away: a block lies partly in the hull of its own."""
    partner = torch.arange(24) ^ 1
    partner[:4], partner[20:] = torch.arange(20, 24), torch.arange(4)
    return Plan(paired(partition(torch.zeros(24, dtype=torch.int64)), partner), None)


def whole_region_plan():
    """All keys of the region are positives."""
    pairs, _ = self_plan(seed=5)
    region, alive = pairs.intervals.region(), torch.arange(40) < pairs.live()
    start, end = pairs.intervals.key_start[region] * alive, pairs.intervals.key_end[region] * alive
    return Plan(pairs.replace(pos_start=start, pos_end=end), None)


def cross_plan(n=30, m=50, regions=3, seed=0, with_self=False):
    """Keys of each region anywhere; of each row no positive, one, some or all; rows between regions are dead."""
    edges = torch.cat([torch.zeros(1), integers(n + 1, 2 * regions - 2, seed=seed).sort().values, torch.tensor([n])])
    anchor_start, anchor_end = edges[0::2].int(), edges[1::2].int()
    key = integers(m + 1, 2, regions, seed=seed + 1).sort(0).values.int()
    pos_start, pos_end = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    for r in range(regions):
        low, high = int(key[0, r]), int(key[1, r])
        for i in range(int(anchor_start[r]), int(anchor_end[r])):
            a, b = sorted((low + (i * 7) % (high - low + 1), low + (i * 5 + 3) % (high - low + 1)))
            one = min(a + 1, high)
            pos_start[i], pos_end[i] = [(a, a), (a, one), (low, high), (a, b), (high, high)][i // 3 % 5]
    self_pos = integers(m, n, seed=seed + 2).int() if with_self else torch.full((n,), -1, dtype=torch.int32)
    self_pos[::4] = -1
    order = torch.arange(n, dtype=torch.int32)
    return Plan(Pairs(order, Intervals(pos_start, pos_end, self_pos, anchor_start, anchor_end, key[0], key[1])), m)


def labelled_keys_plan():
    return Plan(
        partition_against(choice([0, 1, 2, 5, 255], 33), choice([0, 1, 2, 7, 255], 47), ignore_index=(255,))[0], 47
    )


def cells_plan():
    """Anchors of large regions against one of their small cells: themselves among the keys, or not."""
    labels = choice([0, 1, 1, 2, 255], 2 * 6 * 7)
    region, number = grid_regions(2, (6, 7), (4, 4))
    cell, cells = grid_regions(2, (6, 7), (2, 2))
    pairs = partition(labels, region, number, background=0, ignore_index=(255,))
    keys = partition(labels, cell, cells, background=0, ignore_index=(255,))
    of_region = cells_of_regions(torch.arange(number), Grid(2, (6, 7), (4, 4)), Grid(2, (6, 7), (2, 2)))
    return Plan(against_cells(pairs, keys, of_region[1], labels, 0), 2 * 6 * 7)


def keys_in_any_order_plan():
    """Keys of the regions neither ascend nor are there for each; no region shares one."""
    anchors, keys = ([0, 9, 9, 20, 24], [9, 9, 20, 24, 31]), ([30, 12, 0, 0, 16], [47, 16, 12, 0, 30])
    spans = [(a, b, low, high) for a, b, low, high in zip(*anchors, *keys, strict=True)]
    positives = [(low + (high - low) * (i % 3) // 4, high - (high - low) * (i % 4) // 8)
                 for a, b, low, high in spans for i in range(a, b)]  # fmt: skip
    bounds = [torch.tensor(values, dtype=torch.int32) for values in (*zip(*positives), *anchors, *keys)]
    order = torch.arange(len(positives), dtype=torch.int32)
    return Plan(Pairs(order, Intervals(*bounds[:2], torch.full_like(order, -1), *bounds[2:])), 50)


def gathered_plan(labels, more):
    """Anchors among keys of which others are more, as of other ranks."""
    pairs = partition(labels, ignore_index=(255,))
    order, keys = partition(torch.cat([more, labels]), ignore_index=(255,))
    place = torch.empty_like(order).scatter_(0, order.long(), keys.self_pos)[len(more) :][pairs.order.long()]
    positives = {"pos_start": keys.pos_start[place.long()], "pos_end": keys.pos_end[place.long()], "self_pos": place}
    return Plan(pairs.replace(**positives, key_start=keys.key_start, key_end=keys.key_end), order.numel())


def keys_around_plan():
    """Anchors in the middle of their region, keys alone before and after them."""
    pairs, _ = long_plan(6, 10, 9, 7, background=0)
    return Plan(pairs.replace(anchor_end=torch.tensor([25], dtype=torch.int32)), None)


PLANS = {
    "self": self_plan,
    "self without background": lambda: self_plan(background=None, seed=3),
    "self, one region": lambda: self_plan(60, 0, seed=4),
    "one class": lambda: long_plan(25),
    "one row": lambda: long_plan(1),
    "long and short runs": lambda: long_plan(9, 20, 1, 2, 3, 11, 1, 1, background=0),
    "many short runs": lambda: long_plan(*[3, 1, 2] * 8, background=0),
    "keys around": keys_around_plan,
    "only singletons": lambda: long_plan(*[1] * 20),
    "two a class": lambda: long_plan(*[2] * 10, 1),
    "no row": lambda: long_plan(0),
    "paired": paired_plan,
    "paired, one group": lambda: paired_plan(11, 1),
    "paired, own groups": lambda: Plan(paired(partition(torch.arange(9).repeat(2)), torch.arange(18) ^ 1), None),
    "paired, near and far": near_and_far_pairs_plan,
    "whole region": whole_region_plan,
    "cross": cross_plan,
    "cross, many regions": lambda: cross_plan(70, 40, 9, seed=1),
    "cross with self": lambda: cross_plan(with_self=True, seed=6),
    "labelled keys": labelled_keys_plan,
    "keys in any order": keys_in_any_order_plan,
    "one to one": lambda: Plan(one_to_one(23, torch.device("cpu")), 23),
    "cells": cells_plan,
    "gathered": lambda: gathered_plan(choice([0, 1, 2, 255], 33), choice([0, 1, 2, 5, 255], 20)),
    "gathered, many classes": lambda: gathered_plan(integers(20, 60), integers(25, 30, seed=1)),
    "gathered, two a class": lambda: gathered_plan(torch.arange(12), torch.arange(15).flip(0)),
    "gathered, one or two a class": lambda: gathered_plan(torch.arange(12), torch.arange(6)),
    "no keys": lambda: Plan(one_to_one(3, torch.device("cpu")).replace(
        pos_start=torch.zeros(3).int(), pos_end=torch.zeros(3).int(), key_end=torch.zeros(1).int()), 0),
}  # fmt: skip


def allowed(plan, rule):
    """The pairs of a rule as a boolean matrix, one row at a time."""
    pairs, num_keys = plan
    count = pairs.order.numel()
    mask = torch.zeros(count, count if num_keys is None else num_keys, dtype=torch.bool)
    bounds = (bound.tolist() for bound in pairs.intervals[3:])
    for a0, a1, k0, k1 in zip(*bounds, strict=True):
        for i in range(a0, a1):
            p0, p1, own = (int(bound[i]) for bound in pairs.intervals[:3])
            if rule != "positives":
                mask[i, k0:k1] = True
            if rule != "others" and rule != "every":
                mask[i, p0:p1] = rule == "positives"
            if rule != "every" and own >= 0:
                mask[i, own] = False
    return mask


def inputs(plan, dim=5, length=1.0, seed=0):
    """Anchors, and keys or None, as leaves; dead rows hold what they like."""
    anchors = (length * rows(plan.pairs.order.numel(), dim, seed=seed)).requires_grad_()
    keys = None if plan.num_keys is None else (length * rows(plan.num_keys, dim, seed=seed + 1)).requires_grad_()
    return anchors, keys


BACKEND = "blockwise"  # of rows where a test does not say; the fixture `schedule` sets it


def as_rows(x, backend=None):
    """Packed rows whose gradient is that of x."""
    return None if x is None else Rows(x.detach(), x, backend or BACKEND)


def finite(values):
    """-inf is the defined value of an empty set and has no gradient."""
    return torch.where(values == -math.inf, 0.0, values)


def compare(actual, expected, leaves, noise=NOISE):
    """Values, and gradients under one random upstream gradient."""
    assert_exact(actual, expected, floor=noise)
    upstream = rows(*actual.shape, seed=99)
    grads = torch.autograd.grad((upstream * finite(actual)).sum(), leaves)
    expected_grads = torch.autograd.grad((upstream * finite(expected)).sum(), leaves, allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_exact(grad, torch.zeros_like(grad) if expected_grad is None else expected_grad, floor=noise * 10)


def some_bias(count):
    """Log-multiplicities, among them -inf (a key that is not there)."""
    return torch.where(torch.arange(count) % 5 == 2, -math.inf, rows(count, seed=11))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# Plans in which the keys are the anchors, and plans with other keys.
OF_ONE_SET = [name for name, make in PLANS.items() if make().num_keys is None]
OF_KEYS = [name for name in PLANS if name not in OF_ONE_SET]
