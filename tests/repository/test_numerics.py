"""The yardstick accepts what is right and rejects what is wrong, at every scale and dtype."""

import pytest
import torch

from tests.tools.numerics import BUDGETS, LARGEST_ERROR, assert_exact, assert_within_budget

SCALES = [1e-9, 1e-4, 1.0, 1e6]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

WRONG = {
    "zero": torch.zeros_like,
    "flipped": lambda g: -g,
    "ten percent more": lambda g: 1.1 * g,
    "ten percent less": lambda g: 0.9 * g,
    "rows permuted": lambda g: g.roll(1, 0),
    "one row lost": lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])]),
    "one NaN": lambda g: g.index_fill(0, torch.tensor([3]), float("nan")),
    "one inf": lambda g: g.index_fill(0, torch.tensor([3]), float("inf")),
}


def gradient(scale):
    """A float64 gradient whose rows all matter: no permutation of them and no lost row is a small change."""
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    return scale * g / g.norm(dim=1, keepdim=True)


def rounded(exact, dtype):
    """What a plain computation in `dtype` might return, kept in float32 so that 1e-9 and 1e6 fit."""
    largest = exact.abs().max()
    return ((exact / largest).to(dtype).double() * largest).float()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["loss", "lse", "grad"])
def test_accepts_the_plain_computation(kind, dtype, scale):
    exact = gradient(scale)
    eager = rounded(exact, dtype)
    assert_within_budget(eager, eager, exact, kind, dtype)
    assert_within_budget(exact.float(), eager, exact, kind, dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_rejects_wrong_gradients(wrong, dtype, scale):
    exact = gradient(scale)
    eager = rounded(exact, dtype)
    with pytest.raises(AssertionError):
        assert_within_budget(WRONG[wrong](eager), eager, exact, "grad", dtype)


@pytest.mark.parametrize("wrong", WRONG)
def test_rejects_wrong_gradients_beside_a_useless_plain_computation(wrong):
    """A plain computation that is itself off by 40 % must not open the budget."""
    exact = gradient(1.0)
    with pytest.raises(AssertionError):
        assert_within_budget(WRONG[wrong](exact.float()), 1.4 * exact.float(), exact, "grad")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("wrong", WRONG)
def test_exact_rejects_wrong_gradients(wrong, scale):
    exact = gradient(scale)
    assert_exact(exact * (1 + 1e-12), exact)
    for bad in (WRONG[wrong](exact), exact * (1 + 1e-9)):
        with pytest.raises(AssertionError):
            assert_exact(bad, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_three_times_the_error(dtype):
    """The factor is 2 and no wider. The error sits in one entry, where the cosine does not see it."""
    exact, ulps = gradient(1.0), BUDGETS["grad", dtype].ulps
    largest = exact.abs() == exact.abs().max()
    error = largest * 2 * ulps * torch.finfo(dtype).eps * exact
    eager = (exact + error).float()
    assert_within_budget((exact - 1.5 * error).float(), eager, exact, "grad", dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget((exact + 3 * error).float(), eager, exact, "grad", dtype)


def test_scalars():
    exact = torch.tensor(3.25, dtype=torch.float64)
    assert_within_budget(exact.float(), exact.float(), exact, "loss")
    for bad in (0.0, -3.25, 3.575, float("nan")):
        with pytest.raises(AssertionError):
            assert_within_budget(torch.tensor(bad), exact.float(), exact, "loss")


def test_infinite_statistics_must_agree():
    exact = torch.tensor([1.0, -torch.inf, 2.0], dtype=torch.float64)
    assert_exact(exact.clone(), exact)
    assert_within_budget(exact.float(), exact.float(), exact, "lse")
    for bad in ([1.0, -1e30, 2.0], [1.0, torch.inf, 2.0], [-torch.inf, -torch.inf, 2.0], [1.0, torch.nan, 2.0]):
        bad = torch.tensor(bad, dtype=torch.float64)
        with pytest.raises(AssertionError):
            assert_exact(bad, exact)
        with pytest.raises(AssertionError):
            assert_within_budget(bad.float(), exact.float(), exact, "lse")


def test_exact_zero_is_zero_and_shapes_and_dtypes_are_checked():
    zero = torch.zeros(3, dtype=torch.float64)
    assert_exact(zero, zero)
    assert_exact(zero + 1e-17, zero, floor=1e-15)
    assert_exact(zero[:0], zero[:0])
    assert_within_budget(zero.float(), zero.float(), zero, "grad")
    for bad in (zero + 1e-17, zero[:2], zero.float()):
        with pytest.raises(AssertionError):
            assert_exact(bad, zero)
    with pytest.raises(AssertionError):
        assert_within_budget(zero.float() + 1e-30, zero.float(), zero, "grad")


def test_no_row_of_the_table_admits_ten_percent():
    for (_, dtype), budget in BUDGETS.items():
        assert budget.ulps * torch.finfo(dtype).eps < LARGEST_ERROR < 0.1
        assert budget.factor <= 2 and 0.99 < budget.cosine < 1
