"""Near its minimum a loss is no rounding error in the Triton kernels either, in fp32 and fp16."""

import pytest
import torch

from tests.tools.kernels import DEVICE, needs_kernels
from tests.tools.near_minimum import CASES, SPREADS, assert_near, run_on

pytestmark = [
    needs_kernels,
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def device():
    run_on(DEVICE)
    yield
    run_on(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, dtype):
    """Half of the spreads with each loss and dtype, in turn."""
    turn = list(CASES).index(name)
    for number, spread in enumerate(SPREADS.values()):
        if (number + turn + (dtype == torch.float16)) % 2:
            continue
        assert_near(CASES[name], spread, (0.01, 0.02, 0.05, 0.1)[(number + turn) % 4], dtype, backend="triton")
