"""`pair_lse` of rows with other keys on the kernels, against its dense form."""

import pytest

from hpcloss.primitives.pair_lse import RULES
from tests.tools.kernels import DTYPES, needs_kernels
from tests.tools.plans import OF_KEYS
from tests.tools.problems import check_pair_lse

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", OF_KEYS)
def test_pair_lse_of_keys(plan, rule, dtype):
    check_pair_lse(plan, rule, dtype)
