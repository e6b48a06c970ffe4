"""`pair_cross_entropy` on the kernels against its dense form, and all primitives at odd sizes."""

import pytest
import torch

from hpcloss.primitives.pair_lse import RULES
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.plans import (
    PLANS,
    cross_plan,
    self_plan,
)
from tests.tools.problems import Problem

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_pair_cross_entropy(plan, dtype):
    """Uniform weights always, others in turn; the gradient of the loss alone and of both results."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan)
    problem.pair_cross_entropy((3.0, 60.0)[turn % 2])
    problem.pair_cross_entropy((20.0, 0.5)[turn % 2], (1.5, -20.0)[turn // 2 % 2], of_lse=bool(turn % 2))
    if dtype == torch.float32:
        problem.pair_cross_entropy(-2.0, (0.0, 1.5)[turn % 2], of_lse=not turn % 2)


SIZES = [(1, 257, 1), (2, 33, 64), (15, 16, 7), (16, 15, 100), (17, 1, 16), (31, 2, 7), (33, 31, 100), (257, 17, 16)]
SIZES += [] if DEVICE.type == "cpu" else [(1025, 2047, 128), (700, 1300, 512)]


@pytest.mark.parametrize("n,m,dim", SIZES)
@pytest.mark.parametrize("cross", [False, True])
def test_sizes(n, m, dim, cross):
    plan = cross_plan(n, m, 2, with_self=True, seed=n) if cross else self_plan(n, 1, seed=n)
    rule, dtype = RULES[(n + m) % 4], DTYPES[(n + dim) % 2]
    Problem(plan, torch.float32, dim).pair_lse("negatives", 3.0, bound=3.0)
    Problem(plan, dtype, dim).pair_lse(rule, 3.0)
    Problem(plan, DTYPES[(n + dim + 1) % 2], dim).pair_mean("own", 2.5, hardness=1.5, detach=False)
