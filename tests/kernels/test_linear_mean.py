"""The mean over positives of a linear term on the kernels, at every size and of every class."""

import pytest
import torch

from hpcloss.plan.partition import partition
from tests.tools.cases import rows, runs
from tests.tools.kernels import needs_kernels
from tests.tools.linear_means import SIZED, check_linear

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # a GPU says nothing of inf - inf
]


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("n,dim,dtype", [
    (0, 7, torch.float32), (1, 64, torch.float16), (2, 1, torch.float32), (31, 100, torch.float16),
    (257, 64, torch.float32), (600, 7, torch.float32),
])  # fmt: skip
def test_linear_mean_of_sizes(name, n, dim, dtype, blocks):
    check_linear(rows(n, dim, dtype=dtype), SIZED[name](n), -0.7 if dim == 7 else 3.0)


def test_linear_mean_of_wide_rows(blocks):
    check_linear(rows(70, 512, dtype=torch.float16), partition(runs(2, 1, 40, 27)))
