"""`pair_mean` of rows with other keys on the kernels, against its dense form."""

import pytest

from tests.tools.kernels import DTYPES, needs_kernels
from tests.tools.plans import OF_KEYS
from tests.tools.problems import check_pair_mean

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", OF_KEYS)
def test_pair_mean_of_keys(plan, dtype):
    check_pair_mean(plan, dtype)
