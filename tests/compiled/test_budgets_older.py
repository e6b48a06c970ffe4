"""Shipped kernels compiled for Turing and Ampere."""

import pytest

from tests.tools.budgets import assert_budget, targets


@pytest.mark.parametrize(("capability", "dtype", "precision", "dim", "name"), list(targets((75, 80, 86))))
def test_budget(capability, dtype, precision, dim, name, matmul_precision):
    matmul_precision("highest" if precision == "half" else precision)
    assert_budget(capability, dtype, precision, dim, name)
