"""The recipes of docs/recipes.md through the Triton kernels: the same functions, with another backend."""

import pytest
import torch

from tests.losses.test_recipes import dense_balanced, dense_confident_negatives, dense_lifted, recipe
from tests.tools.cases import choice, integers, rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.numerics import assert_within_budget

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

SHAPE = (2, 5, 7, 6)
LABELS = choice([0, 1, 2, 255], 2, 7, 6)
CONFIDENCE = rows(2, 7, 6, seed=2).sigmoid()
REGIONS = recipe("shuffled_blocks")(2, (7, 6), 4)
BANKS = (rows(20, 5, seed=3), choice([0, 1, 2, -1], 20, seed=4), rows(30, 5, seed=5), choice([0, 1, -1], 30, seed=6))
BOUNDARY = integers(2, 2, 7, 6, seed=7) == 1


def on_device(*values):
    return [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values]


def balanced(x):
    return recipe("balanced_loss")(x, *on_device(LABELS, *REGIONS), 3, 0.5, backend="triton")


def confident_negatives(x, y, z):
    labels, confidence = on_device(LABELS, CONFIDENCE)
    return recipe("confident_negatives_loss")(x, y, labels, z, labels, confidence, 3, 7, 0.5, backend="triton")


def lifted(x):
    banks = [bank.to(x.dtype) if bank.is_floating_point() else bank for bank in BANKS]
    return recipe("lifted_boundary_loss")(x, *on_device(LABELS, BOUNDARY, *banks), 0.5, backend="triton")


def plain_balanced(x):
    return dense_balanced(x, LABELS, REGIONS[0], 0.5)


def plain_confident_negatives(x, y, z):
    return dense_confident_negatives(x, y, z, LABELS, LABELS, CONFIDENCE, 3, 7, 0.5)


def plain_lifted(x):
    edge, edge_labels, inner, inner_labels = BANKS
    return dense_lifted(x, LABELS, BOUNDARY, edge.to(x.dtype), edge_labels, inner.to(x.dtype), inner_labels, 0.5)


RECIPES = [(balanced, plain_balanced), (confident_negatives, plain_confident_negatives), (lifted, plain_lifted)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "plain"), RECIPES, ids=lambda function: function.__name__)
def test_recipes(loss, plain, dtype):
    maps = [rows(*SHAPE, seed=seed, dtype=dtype) for seed in range(3 if loss is confident_negatives else 1)]

    def value_and_grads(function, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in maps]
        value = function(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves)

    actual, grads = value_and_grads(loss, DEVICE, dtype)
    eager, eager_grads = value_and_grads(plain, "cpu", dtype)
    exact, exact_grads = value_and_grads(plain, "cpu", torch.float64)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, eager, exact, "loss")
    for grad, eager_grad, exact_grad in zip(grads, eager_grads, exact_grads, strict=True):
        assert_within_budget(grad, eager_grad, exact_grad, "grad")
