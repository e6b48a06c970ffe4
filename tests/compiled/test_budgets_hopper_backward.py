"""Shipped kernels compiled for Hopper, for which every variant is: the backward passes."""

import pytest

from tests.tools.budgets import CALLS, assert_budget, targets

PASSES = [call for call in CALLS if "backward" in call]


@pytest.mark.parametrize(
    ("capability", "dtype", "precision", "dim", "name"),
    list(targets([90], PASSES)),
)
def test_budget(capability, dtype, precision, dim, name, matmul_precision):
    matmul_precision("highest" if precision == "half" else precision)
    assert_budget(capability, dtype, precision, dim, name)
