"""The one tolerance table of the tests, and the assertions that read it.

Errors are relative to the largest entry, never absolute: a mean over 65 536 rows has gradients of 1e-9. The measure of
a float32 or half-precision result is what the same computation written plainly makes of the same inputs in the same
dtype, both against float64. Create inputs in the tested dtype and promote them: their rounding is nobody's error.
"""

from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1  # a changed row needs a dated entry in hpcloss/DESIGN.md

EXACT = 1e-10  # float64 against float64
LARGEST_ERROR = 0.05  # no budget may exceed this share of the largest entry, however bad the plain computation is


class Budget(NamedTuple):
    factor: float  # times the error of the plain computation in the same dtype
    ulps: float  # times eps(dtype) times the largest exact entry
    cosine: float  # smallest cosine between the result and the exact one


BUDGETS = {
    ("loss", torch.float32): Budget(2, 16, 1 - 1e-6),
    ("loss", torch.float16): Budget(2, 4, 1 - 1e-4),
    ("loss", torch.bfloat16): Budget(2, 2, 1 - 1e-3),
    ("lse", torch.float32): Budget(2, 8, 1 - 1e-6),
    ("lse", torch.float16): Budget(2, 4, 1 - 1e-4),
    ("lse", torch.bfloat16): Budget(2, 2, 1 - 1e-3),
    ("grad", torch.float32): Budget(2, 16, 1 - 1e-6),
    ("grad", torch.float16): Budget(2, 4, 1 - 1e-4),
    ("grad", torch.bfloat16): Budget(2, 2, 1 - 1e-3),
}


def _finite_parts(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 where `expected` is finite; infinities must agree exactly and NaN is never right."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert not expected.isnan().any(), "the expected value holds NaN"
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite()), "infinite at other places than expected"
    assert torch.equal(actual[~finite], expected[~finite]), "infinity of the wrong sign"
    return actual[finite], expected[finite]


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_exact(actual: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    """float64 results agree to 1e-10 of the largest expected entry.

    `floor`: size below which a value is rounding noise, for what vanishes in exact arithmetic only (give the reason).
    """
    assert actual.dtype == torch.float64, f"exact comparison is for float64, got {actual.dtype}"
    actual, expected = _finite_parts(actual, expected)
    error, allowed = _largest(actual - expected), max(EXACT * _largest(expected), floor)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} at largest entry {_largest(expected):.3e}"


def assert_within_budget(
    actual: Tensor, same_dtype_eager: Tensor, exact64: Tensor, kind: str, dtype: torch.dtype | None = None
) -> None:
    """`actual` is at most factor times as wrong as `same_dtype_eager`, plus a few ulps, and points the same way.

    kind: "loss", "lse" (row statistics, -inf allowed) or "grad". dtype: that of the computation where the results are
    stored in another one (float32 gradients of half-precision rows); by default that of `same_dtype_eager`.
    """
    assert exact64.dtype == torch.float64, f"the measuring stick must be float64, got {exact64.dtype}"
    dtype = dtype or same_dtype_eager.dtype
    if dtype == torch.float64:
        return assert_exact(actual.double(), exact64)
    budget = BUDGETS[kind, dtype]
    eager, _ = _finite_parts(same_dtype_eager, exact64)
    actual, exact = _finite_parts(actual, exact64)
    largest = _largest(exact)
    eager_error, error = _largest(eager - exact), _largest(actual - exact)
    allowed = min(budget.factor * eager_error + budget.ulps * torch.finfo(dtype).eps * largest, LARGEST_ERROR * largest)
    assert error <= allowed, (
        f"{kind} {dtype}: error {error:.3e}, allowed {allowed:.3e} "
        f"(plain computation {eager_error:.3e}, largest entry {largest:.3e})"
    )
    if largest > 0:
        a, e = actual / largest, exact / largest  # no underflow in the squares
        cosine = (a @ e / (a.norm() * e.norm())).item()
        assert cosine >= budget.cosine, f"{kind} {dtype}: cosine {cosine:.9f}, required {budget.cosine:.9f}"
    return None
