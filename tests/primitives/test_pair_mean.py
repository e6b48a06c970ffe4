"""`pair_mean` on PyTorch tiles against its dense form, in float64."""

import math

import pytest
import torch

from hpcloss import reference
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.scale import Scale
from tests.tools.cases import rows
from tests.tools.numerics import assert_exact
from tests.tools.plans import (
    NOISE,
    PLANS,
    allowed,
    as_rows,
    compare,
    cross_plan,
    inputs,
    long_plan,
    self_plan,
    some_bias,
)


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
