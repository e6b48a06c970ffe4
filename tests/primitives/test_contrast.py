"""The contrast on the dense backend against the recipe over streaming tiles, in float64."""

import pytest
import torch

from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.scale import Scale
from tests.primitives.conftest import DENSE
from tests.tools.numerics import assert_exact
from tests.tools.plans import NOISE, PLANS, as_rows, inputs, rows

FORMS = [
    {"denominator": "all"},
    {"denominator": "all", "hardness": 1.5, "multiplicity": 3},
    {"denominator": "all", "hardness": -2.0, "detach_weights": False},
    {"denominator": "negatives"},
    {"denominator": "negatives", "hardness": 1.5, "detach_weights": False, "multiplicity": 4},
    {"denominator": "own"},
    {"denominator": "own", "hardness": 1.5, "multiplicity": 2},
    {"denominator": "own", "hardness": -3.0, "detach_weights": False},
    {"denominator": "own", "discount": 0.3},
    {"denominator": "own", "discount": 0.3, "hardness": 1.0, "detach_weights": False},
]
PAIRED = ("one to one", "paired", "paired, some without")


def losses_and_gradients(plan, form, backend, value, bound):
    """Losses, which are counted, and the gradients of their weighted sum."""
    anchors, keys = inputs(plan)
    scale = torch.tensor(value).double().requires_grad_()
    loss, counted = contrast(
        as_rows(anchors, backend), plan.pairs, scale=Scale(scale, bound), keys=as_rows(keys, backend), **form
    )
    leaves = [x for x in (anchors, keys, scale) if x is not None]
    return loss, counted, torch.autograd.grad((loss * rows(*loss.shape, seed=99)).sum(), leaves)


def assert_same_contrast(plan, form, value=3.0):
    found = losses_and_gradients(plan, form, "dense", value, None)
    expected = losses_and_gradients(plan, form, "blockwise", value, None)
    assert torch.equal(found[1], expected[1])
    assert_exact(found[0], expected[0], floor=10 * NOISE)
    for grad, exact in zip(found[2], expected[2], strict=True):
        assert_exact(grad, exact, floor=100 * NOISE)


on_dense = pytest.mark.parametrize("schedule", DENSE, indirect=True)


@on_dense
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_contrast(plan, form, schedule):
    for value in (3.0, 0.01, 90.0):
        assert_same_contrast(PLANS[plan](), form, value)


@on_dense
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan in PAIRED])
def test_contrast_of_pairs(plan, schedule):
    for value in (3.0, 0.01, 90.0):
        assert_same_contrast(PLANS[plan](), {"denominator": "pair"}, value)
