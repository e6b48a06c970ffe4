"""Every loss of the list on the kernels in fp32, against the reference; half precision is tested by recipe."""

import inspect
from functools import partial

import pytest
import torch

from tests.tools.kernels import DEVICE
from tests.tools.losses import FAST, LOSSES, ORACLE, Sizes
from tests.tools.numerics import assert_within_budget

# A GPU says nothing: what does not count may overflow before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name):
    loss = LOSSES[name]
    inputs = loss.inputs(Sizes(2, (8, 6), 48, 7, torch.float32))
    first = next(iter(inputs))
    known = inspect.signature(ORACLE[name]).parameters
    exact = partial(ORACLE[name], **{key: x for key, x in loss.required.items() if key in known})

    def evaluate(call, dtype, device="cpu"):
        moved = {key: x.to(device, dtype if x.is_floating_point() else None) for key, x in inputs.items()}
        leaf = moved[first].requires_grad_()
        value = call(**moved)
        return value.detach().cpu(), torch.autograd.grad(value, leaf)[0].cpu()

    fast = partial(FAST[name], **loss.required, backend="triton")
    expected, plain = evaluate(exact, torch.float64), evaluate(exact, torch.float32)
    for kind, found, eager, exact64 in zip(("loss", "grad"), evaluate(fast, torch.float32, DEVICE), plain, expected):
        assert_within_budget(found, eager, exact64, kind)
