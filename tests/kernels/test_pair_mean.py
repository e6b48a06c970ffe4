"""`pair_mean` of rows with themselves on the kernels, against its dense form."""

import pytest

from tests.tools.kernels import DTYPES, needs_kernels
from tests.tools.plans import OF_ONE_SET
from tests.tools.problems import Problem, check_pair_mean

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", OF_ONE_SET)
def test_pair_mean(plan, dtype):
    check_pair_mean(plan, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["self", "cross with self"])
@pytest.mark.parametrize("detach", [True, False])
def test_weights_of_prototypes(plan, dtype, detach):
    """PCCS at temperature 0.01: weights e^(100 s), finite in half precision."""
    problem = Problem(plan, dtype)
    for term in ("own", "logit"):
        for bound in (None, 100.0):
            problem.pair_mean(term, 100.0, bound, hardness=-100.0, detach=detach)
