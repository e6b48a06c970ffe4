"""`one_positive` on the PyTorch backends against its dense form, in float64."""

import importlib

import pytest
import torch

from hpcloss import reference
from hpcloss.plan.partition import paired, partition, two_by_two
from hpcloss.primitives.one_positive import one_positive
from hpcloss.primitives.scale import Scale
from tests.tools.cases import rows
from tests.tools.numerics import assert_exact
from tests.tools.plans import NOISE, PLANS, Plan, allowed, as_rows, finite, gathered_plan, inputs


def among_others_plan(first=5, dead=0):
    """Anchors, each with its partner, among more keys, as of other ranks; some of these do not exist."""
    labels = torch.cat([torch.zeros(first, dtype=torch.int64), torch.full((dead,), 255)])
    plan = gathered_plan(torch.zeros(8, dtype=torch.int64), labels)
    return Plan(paired(plan.pairs, plan.pairs.intervals.self_pos[torch.arange(8) ^ 1]), plan.num_keys)


MADE = {
    "among others": among_others_plan,
    "among others, some dead": lambda: among_others_plan(3, 4),
    "two by two": lambda: Plan(two_by_two(13, torch.device("cpu")), None),
    "one image": lambda: Plan(two_by_two(1, torch.device("cpu")), None),
    "no image": lambda: Plan(two_by_two(0, torch.device("cpu")), None),
    **{name: PLANS[name] for name in PLANS if name.startswith(("paired", "one to one"))},
}
SCALES = ((3.0, None), (3.0, 100.0), (0.0, 1.0), (90.0, None))


@pytest.fixture(params=[True, False], ids=["the bounds are read", "nothing is read"], autouse=True)
def reads(request, monkeypatch):
    dense = importlib.import_module("hpcloss.backends.dense.one_positive")  # the package has a function of its name
    monkeypatch.setattr(dense, "_reads", lambda at: request.param)


def assert_right(plan, factors, both):
    anchors, keys = inputs(plan)
    others = anchors if keys is None else keys
    positives, negatives = allowed(plan, "positives"), allowed(plan, "negatives")
    for value, bound in SCALES:
        scale = torch.tensor(value).double().requires_grad_()
        own, lse = one_positive(
            as_rows(anchors), plan.pairs, Scale(scale, bound), keys=as_rows(keys), factors=factors, both=both
        )
        lse = torch.stack(lse) if len(factors) > 1 else lse
        mean, _ = reference.pair_mean(anchors, others, positives, scale, 0.0, None, "logit")
        exact = [reference.pair_lse(anchors, others, negatives, factor * scale) for factor in factors]
        if both:
            exact.append(reference.pair_lse(others, anchors, negatives.T, scale))
        exact = torch.stack(exact) if len(exact) > 1 else exact[0]
        assert_exact(own, mean, floor=NOISE)
        assert_exact(lse, exact, floor=NOISE)
        leaves = [x for x in (anchors, keys, scale) if x is not None]
        weights = rows(*own.shape, seed=98), rows(*lse.shape, seed=99)
        found, expected = (
            torch.autograd.grad((weights[0] * one).sum() + (weights[1] * finite(rest)).sum(), leaves, allow_unused=True)
            for one, rest in ((own, lse), (mean, exact))
        )
        for grad, exact_grad in zip(found, expected, strict=True):
            assert_exact(grad, torch.zeros_like(grad) if exact_grad is None else exact_grad, floor=10 * NOISE)


@pytest.mark.parametrize("plan", MADE)
@pytest.mark.parametrize("factors", [(1.0,), (0.4,), (2.0, 1.0), (3.5, 2.5)])
def test_one_positive(plan, factors, schedule):
    assert_right(MADE[plan](), factors, both=False)


def test_both_directions(schedule):
    assert_right(PLANS["one to one"](), (1.0,), both=True)


def test_a_factor_that_overflows(schedule):
    """The scale is safe without a shift, its multiple is not: unit rows in fp32."""
    data = torch.eye(4)[torch.tensor([0, 0, 0, 0, 1, 1])].requires_grad_()
    plan = Plan(two_by_two(3, torch.device("cpu")), None)
    scale = Scale(torch.tensor(30.0), 30.0)
    _, lse = one_positive(as_rows(data), plan.pairs, scale, factors=(1.0, 4.0))
    (grad,) = torch.autograd.grad(lse[1].sum(), data)
    exact = torch.tensor([2.0, 2.0, 2.0, 2.0, 4.0, 4.0]).log() + torch.tensor([120.0] * 4 + [0.0] * 2)
    torch.testing.assert_close(lse[1], exact)
    assert grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_two_by_two_is_the_partition_by_image(count):
    found, pairs = two_by_two(count, torch.device("cpu")), partition(torch.arange(count).repeat(2))
    view, image = pairs.order // max(count, 1), pairs.order % max(count, 1)
    row_of = {(int(v), int(i)): row for row, (v, i) in enumerate(zip(view, image))}
    partner = torch.tensor([row_of[1 - int(v), int(i)] for v, i in zip(view, image)], dtype=torch.int64)
    expected = paired(pairs, partner)
    for one, other in zip((found.order, *found.intervals), (expected.order, *expected.intervals), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
