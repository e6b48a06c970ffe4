"""Entropy-guided and multiscale contrast through the Triton kernels, within the budget of the plain computation."""

import pytest
import torch

from tests.tools.cases import choice, rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_within_budget

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

SHAPE = (2, 5, 7, 6)
LABELS = choice([0, 1, 2, 255], 2, 7, 6)
PROBS = torch.softmax(2 * rows(2, 3, 7, 6, seed=5), 1)
CASES = {
    "high against low": ("entropy_guided_contrast", {"symmetric": True}),
    "high against low, keys differentiated": ("entropy_guided_contrast", {"detach_keys": False}),
    "entropy classes": ("entropy_guided_contrast", {"entropy_classes": True, "denominator": "all"}),
    "patches of an instance": ("multiscale_contrast", {"patch_size": (2, 3)}),
    "patches of a majority": ("multiscale_contrast", {"patch_size": 2, "patch_positives": "majority"}),
}


def call(losses, name, options, device, **every):
    labels = LABELS.to(device)
    if name == "entropy_guided_contrast":
        return lambda x, y: losses[name](x, PROBS.to(device), labels, 0.5, **options, **every)
    if losses is FAST:
        every["samples_per_class"] = None
    return lambda x, y: losses[name](x, y, labels, temperature=0.5, num_classes=3, **options, **every)


def value_and_grads(loss, x, y):
    x, y = (z.detach().requires_grad_() for z in (x, y))
    value = loss(x, y)
    return value.detach(), torch.autograd.grad(value, (x, y), allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_losses_through_the_kernels(case, dtype):
    name, options = CASES[case]
    x, y = (rows(*SHAPE, seed=seed, dtype=dtype) for seed in (0, 1))
    exact, exact_grads = value_and_grads(call(ORACLE, name, options, "cpu"), x.double(), y.double())
    plain, plain_grads = value_and_grads(call(ORACLE, name, options, "cpu"), x, y)
    loss = call(FAST, name, options, DEVICE, backend="triton")
    value, grads = value_and_grads(loss, x.to(DEVICE), y.to(DEVICE))
    assert value.dtype == torch.float32 and exact > 0
    assert_within_budget(value.cpu(), plain, exact, "loss", dtype)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        if exact_grad is not None:
            assert_within_budget(grad.cpu(), plain_grad, exact_grad, "grad", dtype)
