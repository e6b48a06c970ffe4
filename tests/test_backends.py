"""The two primitives on each backend and schedule against their dense float64 form. No loss is known here."""

import math
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch
from cases import choice, integers, rows, runs
from numerics import assert_exact, assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode

from hpcloss import reference
from hpcloss.backends import blockwise, resolve
from hpcloss.backends.blockwise import tiles
from hpcloss.losses.cells import against_cells, cells_of_regions
from hpcloss.plan.partition import Intervals, Pairs, one_to_one, paired, partition, partition_against
from hpcloss.plan.regions import Grid, grid_regions
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import RULES, pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale

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


@pytest.fixture(params=["sliced", "sliced, tiny tiles", "static", "static, one tile"])
def schedule(request, monkeypatch):
    """The host-read slices of the CPU and the fixed masked tiles of devices, at sizes that make many tiles."""
    if request.param == "sliced, tiny tiles":
        monkeypatch.setattr(tiles, "BLOCK", 8)
        monkeypatch.setattr(tiles, "LONG_RUN", 4)
    if request.param.startswith("static"):
        monkeypatch.setattr(tiles, "STATIC_BLOCK", 7 if request.param == "static" else 1024)
        monkeypatch.setattr(
            tiles, "_schedule",
            lambda at, num_keys, rule, symmetric, _: tiles._static_schedule(at.pos_start.numel(), num_keys, symmetric),
        )  # fmt: skip
    return request.param


def inputs(plan, dim=5, length=1.0, seed=0):
    """Anchors, and keys or None, as leaves; dead rows hold what they like."""
    anchors = (length * rows(plan.pairs.order.numel(), dim, seed=seed)).requires_grad_()
    keys = None if plan.num_keys is None else (length * rows(plan.num_keys, dim, seed=seed + 1)).requires_grad_()
    return anchors, keys


def as_rows(x, backend="blockwise"):
    """Packed rows whose gradient is that of x."""
    return None if x is None else Rows(x.detach(), x, backend)


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


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", RULES)
def test_pair_lse(plan, rule, schedule):
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    mask = allowed(plan, rule)
    for value, bias, bound in ((3.0, None, None), (3.0, None, 100.0), (-2.0, None, None), (0.0, None, 1.0),
                               (0.7, some_bias(mask.shape[1]), None), (0.7, some_bias(mask.shape[1]), 20.0),
                               (90.0, None, None)):  # fmt: skip
        scale = torch.tensor(value).double().requires_grad_()
        actual = pair_lse(as_rows(anchors), plan.pairs, rule, Scale(scale, bound), keys=as_rows(keys), bias=bias)
        there = mask if bias is None else mask & (bias > -math.inf)
        expected = reference.pair_lse(anchors, anchors if keys is None else keys, there, scale, bias)
        compare(actual, expected, [x for x in (anchors, keys, scale) if x is not None])


@pytest.mark.parametrize(
    "plan, rule",
    [
        *((plan, "every") for plan in ("one to one", "labelled keys", "keys in any order", "cells", "no keys")),
        ("one to one", "negatives"),
    ],
)
def test_pair_lse_both(plan, rule, schedule):
    """Regions that share no key: the sums over rows and over columns of one matrix."""
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    mask = allowed(plan, rule)
    for value, bound in ((3.0, None), (3.0, 100.0), (-2.0, None), (90.0, None)):
        scale = torch.tensor(value).double().requires_grad_()
        actual = pair_lse_both(as_rows(anchors), as_rows(keys), plan.pairs, rule, Scale(scale, bound))
        expected = (
            reference.pair_lse(anchors, keys, mask, scale, None),
            reference.pair_lse(keys, anchors, mask.T, scale, None),
        )
        compare(torch.cat(actual), torch.cat(expected), [anchors, keys, scale])


def test_pair_lse_both_refuses_rules_it_has_no_intervals_for():
    anchors, keys = inputs(PLANS["labelled keys"]())
    for rule, message in (("others", "rule must be"), ("negatives", "as many keys as anchors, got 47 and 33")):
        with pytest.raises(ValueError, match=message):
            pair_lse_both(
                as_rows(anchors), as_rows(keys), PLANS["labelled keys"]().pairs, rule, Scale(torch.tensor(1.0))
            )


def dense_cross_entropy(anchors, keys, plan, scale, hardness=0.0):
    """loss, lse and mass from their definitions."""
    others, positives = allowed(plan, "others"), allowed(plan, "positives")
    lse = reference.pair_lse(anchors, keys, others, scale)
    mean, mass = reference.pair_mean(anchors, keys, positives, scale, hardness, None, "logit")
    return torch.where(positives.any(1), finite(lse) - mean, 0.0), lse, mass


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("hardness", [0.0, 1.5, -20.0])
def test_pair_cross_entropy(plan, hardness, schedule):
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    for value, bound in ((3.0, None), (3.0, 100.0), (0.01, 1.0), (90.0, None)):
        scale = torch.tensor(value).double().requires_grad_()
        options = {"keys": as_rows(keys), "hardness": hardness}
        loss, lse, mass = pair_cross_entropy(as_rows(anchors), plan.pairs, Scale(scale, bound), **options)
        expected = dense_cross_entropy(anchors, anchors if keys is None else keys, plan, scale, hardness)
        assert not mass.requires_grad
        assert_exact(mass, expected[2], floor=NOISE)
        assert bool((loss >= 0).all())
        leaves = [x for x in (anchors, keys, scale) if x is not None]
        of_loss = [torch.autograd.grad((3 * x).sum(), leaves, retain_graph=True) for x in (loss, expected[0])]
        for grad, exact in zip(*of_loss):
            assert_exact(grad, exact, floor=100 * NOISE)
        compare(torch.cat([loss, lse]), torch.cat(expected[:2]), leaves, noise=10 * NOISE)


@pytest.mark.parametrize("hardness", [0.0, 1.5])
def test_cross_entropy_over_tiles_of_full_size(hardness):
    for plan in (long_plan(300, 513, 127, 3, 128, 1, 150, 129, background=0), self_plan(1100, 1, seed=2),
                 long_plan(*[2] * 600), cross_plan(700, 1300, 2, with_self=True, seed=3)):  # fmt: skip
        anchors, keys = inputs(plan, 3)
        for bound in (None, 100.0):
            scale = torch.tensor(4.0).double().requires_grad_()
            loss, lse, _ = pair_cross_entropy(
                as_rows(anchors), plan.pairs, Scale(scale, bound), keys=as_rows(keys), hardness=hardness
            )
            expected = dense_cross_entropy(anchors, anchors if keys is None else keys, plan, scale, hardness)
            leaves = [x for x in (anchors, keys, scale) if x is not None]
            compare(torch.cat([loss, lse]), torch.cat(expected[:2]), leaves, noise=10 * NOISE)


@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_cross_entropy_of_parts_of_the_keys_merges(hardness):
    """As the docstring says: queues and ranks may hold a part of the keys each."""
    labels, key_labels = integers(4, 30), integers(4, 60, seed=1)
    anchors, keys, scale = rows(30, 5), rows(60, 5, seed=2), torch.tensor(7.0).double()

    def part(chosen):
        pairs, order = partition_against(labels, key_labels[chosen])
        sides = as_rows(anchors[pairs.order.long()]), as_rows(keys[chosen][order.long()])
        return pair_cross_entropy(sides[0], pairs, Scale(scale), keys=sides[1], hardness=hardness)

    whole = part(torch.arange(60))
    # A part without a positive for some anchors, and one without any.
    chosen = [torch.arange(20), torch.arange(20, 60)[key_labels[20:] != 2], torch.arange(20, 60)[key_labels[20:] == 2]]
    losses, lses, masses = (torch.stack(parts) for parts in zip(*map(part, chosen)))
    lse = torch.logsumexp(lses, 0)
    loss = (torch.softmax(masses, 0) * (losses + lse - lses)).sum(0)
    assert_exact(lse, whole[1])
    assert_exact(loss, whole[0])
    assert_exact(torch.logsumexp(masses, 0), whole[2])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("term", ["logit", "own"])
@pytest.mark.parametrize("detach", [True, False])
def test_pair_mean(plan, term, detach, schedule):
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    mask = allowed(plan, "positives")
    count = mask.shape[0]
    stat = torch.where(torch.arange(count) % 4 == 1, -math.inf, 9 * rows(count, seed=5)) if term == "own" else None
    discounts = (0.0, 0.4) if term == "own" else (0.0,)
    for hardness, log_weight, discount in (
        *((h, None, d) for h in (0.0, 1.5, -20.0) for d in discounts),
        (0.0, some_bias(mask.shape[1]), 0.0),
        (0.8, some_bias(mask.shape[1]), discounts[-1]),
    ):
        options = {"hardness": hardness, "log_weight": log_weight, "discount": discount, "detach_weights": detach}
        there = mask if log_weight is None else mask & (log_weight > -math.inf)
        for bound in (None, 60.0):  # the second is the path of a fixed temperature and unit rows
            scale = torch.tensor(2.5).double().requires_grad_(bound is None)
            leaf = None if stat is None else stat.clone().requires_grad_()
            actual, mass = pair_mean(
                as_rows(anchors), plan.pairs, term, Scale(scale, bound), keys=as_rows(keys), stat=leaf, **options
            )
            oracle_keys = anchors if keys is None else keys
            expected, expected_mass = reference.pair_mean(
                anchors, oracle_keys, there, scale, stat=leaf, term=term, **options
            )
            assert not mass.requires_grad
            assert_exact(mass, expected_mass, floor=NOISE)
            compare(actual, expected, [x for x in (anchors, keys, scale, leaf) if x is not None and x.requires_grad])


@pytest.mark.parametrize("term", ["logit", "own"])
def test_pair_mean_of_far_apart_rows(term, schedule):
    """Weights of pairs outside the rule may overflow; they must not leave a NaN behind."""
    plan = self_plan()
    anchors, keys = inputs(plan, length=6.0)
    stat = rows(40, seed=5) if term == "own" else None
    for hardness in (30.0, -30.0):
        options = {"hardness": hardness, "stat": stat, "term": term, "scale": torch.tensor(1.0).double()}
        for detach in (True, False):
            actual, _ = pair_mean(
                as_rows(anchors), plan.pairs, **options | {"scale": Scale(options["scale"])}, detach_weights=detach
            )
            expected, _ = reference.pair_mean(
                anchors, anchors, allowed(plan, "positives"), **options, detach_weights=detach
            )
            # exponents of 5 000 know their weights to 1e-12; gradients through them add and cancel terms of 1e5
            compare(actual, expected, [anchors], noise=NOISE if detach else 1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1.0, 4.0, -1.0])
def test_tiles_of_full_size(rule, scale):
    """Runs around the sizes at which tiles and masks change."""
    for plan in (long_plan(300, 513, 127, 3, 128, 1, 150, 129, background=0), self_plan(1100, 1, seed=2),
                 cross_plan(900, 1300, 3, with_self=True, seed=3)):  # fmt: skip
        anchors, keys = inputs(plan, 3)
        mask, scale_tensor = allowed(plan, rule), torch.tensor(scale).double().requires_grad_()
        for bound in (None, 100.0):
            actual = pair_lse(as_rows(anchors), plan.pairs, rule, Scale(scale_tensor, bound), keys=as_rows(keys))
            expected = reference.pair_lse(anchors, anchors if keys is None else keys, mask, scale_tensor)
            compare(actual, expected, [x for x in (anchors, keys, scale_tensor) if x is not None])


@pytest.mark.parametrize("hardness", [0.0, 1.5])
@pytest.mark.parametrize("term", ["logit", "own"])
def test_means_over_tiles_of_full_size(term, hardness):
    for plan in (long_plan(300, 513, 127, 3, 128, 1, 150, 129, background=0), cross_plan(700, 1300, 2, seed=3)):
        anchors, keys = inputs(plan, 3)
        stat = rows(plan.pairs.order.numel(), seed=5).requires_grad_() if term == "own" else None
        scale = torch.tensor(2.0).double().requires_grad_()
        options = {"hardness": hardness, "stat": stat, "term": term, "scale": scale, "detach_weights": False}
        actual, _ = pair_mean(as_rows(anchors), plan.pairs, keys=as_rows(keys), **options | {"scale": Scale(scale)})
        oracle_keys = anchors if keys is None else keys
        expected, _ = reference.pair_mean(anchors, oracle_keys, allowed(plan, "positives"), **options)
        compare(actual, expected, [x for x in (anchors, keys, scale, stat) if x is not None])


@pytest.mark.parametrize("bound", [74.9, 75.1, 88.0, 200.0, None])
def test_fast_sum_is_safe_up_to_its_bound(bound):
    """exp(75) of 2000 equal keys does not overflow fp32, exp(88) would; exp(-75) is not lost beside nothing else."""
    scale = torch.tensor(74.9 if bound is None else bound)
    for sign in (1.0, -1.0):
        anchors = torch.zeros(2000, 2)
        anchors[:, 0] = 1.0
        anchors[0] *= sign
        pairs = partition(torch.zeros(2000, dtype=torch.int64))
        lse = pair_lse(as_rows(anchors), pairs, "others", Scale(scale, bound))
        exact = reference.pair_lse(
            anchors.double(), anchors.double(), ~torch.eye(2000, dtype=torch.bool), scale.double()
        )
        torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rule", ["negatives", "others"])
def test_self_at_any_key(rule, schedule):
    """Also where it is the first or the last key of a tile."""
    order = torch.arange(5, dtype=torch.int32)
    start, end = torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    anchors, keys = rows(5, 3), rows(20, 3, seed=1)
    for own in range(20):
        pairs = Pairs(order, Intervals(order * 0 + 3, order * 0 + 6, order * 0 + own, start, end, start, end * 4))
        lse = pair_lse(as_rows(anchors), pairs, rule, Scale(torch.tensor(1.0).double()), keys=as_rows(keys))
        expected = reference.pair_lse(anchors, keys, allowed(Plan(pairs, 20), rule), 1.0)
        assert_exact(lse, expected)


@pytest.mark.parametrize("rule", RULES)
def test_keys_in_parts_are_the_whole(rule, schedule):
    plan = cross_plan(30, 50, 3, seed=2)
    pairs, m = plan
    anchors, keys = inputs(plan)
    scale = Scale(torch.tensor(2.0).double())
    whole = pair_lse(as_rows(anchors), pairs, rule, scale, keys=as_rows(keys))
    mean, mass = pair_mean(as_rows(anchors), pairs, "logit", scale, keys=as_rows(keys), hardness=1.5)
    lses, means, masses = [], [], []
    for first, last in ((0, 17), (17, 18), (18, m)):
        inside = {
            name: (getattr(pairs.intervals, name).clamp(first, last) - first)
            for name in ("pos_start", "pos_end", "key_start", "key_end")
        }
        part = pairs.replace(**inside)
        some = as_rows(keys[first:last])
        lses.append(pair_lse(as_rows(anchors), part, rule, scale, keys=some))
        out, weight = pair_mean(as_rows(anchors), part, "logit", scale, keys=some, hardness=1.5)
        means.append(out)
        masses.append(weight)
    assert_exact(torch.logsumexp(torch.stack(lses), 0).detach(), whole.detach(), floor=NOISE)
    share = torch.softmax(torch.stack(masses), 0).nan_to_num(0.0)  # no positive in any part
    merged = (share * torch.stack(means)).sum(0)
    assert_exact(torch.logsumexp(torch.stack(masses), 0), mass, floor=NOISE)
    compare(merged, mean, [anchors, keys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", ["self", "cross", "paired"])
def test_lower_precision(plan, dtype, schedule):
    """Half-precision rows are read as fp32; sums are fp32."""
    plan = PLANS[plan]()
    leaves = [None if x is None else x.detach().to(dtype) for x in inputs(plan)]
    scale = torch.tensor(3.0)

    def run(primitive, cast):
        x, k = (None if leaf is None else leaf.to(cast).requires_grad_() for leaf in leaves)
        out = primitive(x, k)
        grads = torch.autograd.grad(finite(out).sum(), [leaf for leaf in (x, k) if leaf is not None])
        return out.detach(), grads

    def fast(x, k):
        sides = [None if side is None else Rows(side.detach().to(dtype), side, "blockwise") for side in (x, k)]
        return pair_lse(sides[0], plan.pairs, "others", Scale(scale), keys=sides[1])

    def eager(x, k):
        return reference.pair_lse(x, x if k is None else k, allowed(plan, "others"), scale.to(x.dtype))

    (out, grads), (plain, plain_grads), (exact, exact_grads) = (
        run(fast, torch.float32), run(eager, torch.float32), run(eager, torch.float64)
    )  # fmt: skip
    assert out.dtype == torch.float32
    assert_within_budget(out, plain, exact, "lse")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


def backend_calls(n, dim):
    """Forward and backward of both primitives on the backend itself, self-contrast and cross, without autograd."""
    x, k = rows(n, dim, dtype=torch.float32), rows(n, dim, seed=1, dtype=torch.float32)
    pairs = partition(choice([0, 1, 1, 2], n), background=0)
    cross, _ = partition_against(choice([0, 1], n), choice([0, 1], n))
    scale, grad = torch.tensor(2.0), rows(n, seed=2, dtype=torch.float32)
    for keys, at in ((None, list(pairs.intervals)), (k, list(cross.intervals))):
        for rule in RULES:
            for bound in (None, 50.0):
                yield lambda keys=keys, at=at, rule=rule, bound=bound: (
                    lse := blockwise.pair_lse(x, keys, None, scale, bound, at, rule),
                    *blockwise.pair_lse_backward(grad, lse, x, keys, None, scale, bound, at, rule, True, True, True),
                )
        for stat in (None, grad):
            for hardness, bound in ((0.0, None), (1.0, None), (0.0, 20.0), (1.0, 20.0)):
                yield lambda keys=keys, at=at, stat=stat, hardness=hardness, bound=bound: (
                    *(forward := blockwise.pair_mean(x, keys, stat, None, scale, bound, hardness, 0.0, at)),
                    *blockwise.pair_mean_backward(
                        grad, *forward[:2], x, keys, stat, None, scale, bound, hardness, 0.0, bound is not None, at,
                        True, True, bound is None,
                    ),
                )  # fmt: skip


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


def test_no_tensor_grows_with_the_square_of_the_rows():
    n, dim = 3000, 8
    for call in backend_calls(n, dim):
        with LargestTensor() as largest:
            call()
        assert n * dim <= largest.numel <= max(tiles.BLOCK**2, 2 * n * dim)


def test_static_schedule_stays_within_its_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "STATIC_BLOCK", 128)
    monkeypatch.setattr(
        tiles, "_schedule",
        lambda at, num_keys, rule, symmetric, _: tiles._static_schedule(at.pos_start.numel(), num_keys, symmetric),
    )  # fmt: skip
    for call in backend_calls(700, 8):
        with LargestTensor() as largest:
            call()
        assert largest.numel <= max(128**2, 2 * 700 * 8)


def test_memory_of_a_whole_step():
    """A map of 12 288 pixels, one region: 600 MB a matrix of pairs, of which nothing may be seen."""
    script = textwrap.dedent("""
        import resource, sys, torch, hpcloss
        torch.set_num_threads(1)
        def step(side):
            x = torch.randn(1, 16, side, 96, requires_grad=True)
            hpcloss.RegionPHPCLoss(None)(x, torch.randint(0, 4, (1, side, 96))).backward()
        step(8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(128)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((after - before) / (1024 if sys.platform != "darwin" else 1024**2))
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 60


def test_results_are_deterministic_to_the_bit():
    for call in backend_calls(700, 8):
        for first, second in zip(call(), call(), strict=True):
            assert torch.equal(first, second)


def test_nothing_is_written_to_the_inputs():
    plan = self_plan()
    anchors, _ = inputs(plan)
    at = list(plan.pairs.intervals)
    arguments = [anchors.detach(), torch.tensor(2.0).double(), rows(40, seed=3), *at]
    before = [tensor.clone() for tensor in arguments]
    x, scale, grad = arguments[:3]
    lse = blockwise.pair_lse(x, None, None, scale, None, at, "others")
    blockwise.pair_lse_backward(grad, lse, x, None, None, scale, None, at, "others", True, True, True)
    out, mass, _ = blockwise.pair_mean(x, None, grad, None, scale, None, 1.0, 0.1, at)
    blockwise.pair_mean_backward(
        grad, out, mass, x, None, grad, None, scale, None, 1.0, 0.1, False, at, True, True, True
    )
    assert all(torch.equal(tensor, old) for tensor, old in zip(arguments, before, strict=True))


def test_unneeded_gradients_are_not_returned():
    plan = cross_plan()
    anchors, keys = (x.detach() for x in inputs(plan))
    at, scale, grad = list(plan.pairs.intervals), torch.tensor(2.0).double(), rows(30, seed=3)
    lse = blockwise.pair_lse(anchors, keys, None, scale, None, at, "every")
    arguments = (grad, lse, anchors, keys, None, scale, None, at, "every")
    both = blockwise.pair_lse_backward(*arguments, True, True, True)
    for needs_anchors, needs_keys in ((True, False), (False, True), (False, False)):
        some = blockwise.pair_lse_backward(*arguments, needs_anchors, needs_keys, False)
        for needed, got, wanted in zip((needs_anchors, needs_keys), some, both, strict=False):
            assert torch.equal(got, wanted) if needed else got.numel() == 0


def test_stat_goes_with_the_term():
    plan = self_plan()
    anchors, _ = inputs(plan)
    scale = Scale(torch.tensor(1.0).double())
    with pytest.raises(ValueError, match="term 'own' needs stat"):
        pair_mean(as_rows(anchors), plan.pairs, "own", scale)
    with pytest.raises(ValueError, match="term 'logit' takes no stat"):
        pair_mean(as_rows(anchors), plan.pairs, "logit", scale, stat=rows(40))


def test_keys_of_another_backend_are_refused():
    anchors, keys = inputs(PLANS["cross"]())
    sides = as_rows(anchors), as_rows(keys, "triton")
    with pytest.raises(ValueError, match="keys must be packed for backend 'blockwise', as anchors, got 'triton'"):
        pair_lse(sides[0], PLANS["cross"]().pairs, "every", Scale(torch.tensor(1.0).double()), keys=sides[1])


def test_a_scale_and_its_bound():
    rows_of_x = as_rows(rows(3, 4))
    scale = Scale.of(0.25, rows_of_x, normalize=True)
    assert (scale.value.item(), scale.bound, scale.value.dtype) == (4.0, 4.0, torch.float64)
    assert scale.times(-2)[1] == 8.0 and scale.times(-2).value.item() == -8.0
    assert scale.raised(0.5) == (scale.value, 4.5) and scale.unbounded() == (scale.value, None)
    assert Scale.of(0.25, rows_of_x, normalize=False).bound is None
    learnt = torch.nn.Parameter(torch.tensor(0.5))
    assert Scale.of(learnt, rows_of_x, normalize=True).bound is None
    assert Scale.of(learnt, rows_of_x, normalize=True).times(3).value.requires_grad


def test_resolve():
    x = torch.zeros(1, 1)
    assert resolve("auto", x) == "blockwise" and resolve("blockwise", x) == "blockwise"
    with pytest.raises(ValueError, match="backend must be one of .*'eager'"):
        resolve("eager", x)
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call: "):
        resolve("triton", x)
