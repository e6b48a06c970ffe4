"""Small problems and contrasts in pieces in the native library, in fp32: against plain PyTorch in float64.

The budget is twice the error of plain PyTorch in fp32 and a few ulps. Each test says which of the library's functions
must have run, as a fallback would give the same numbers.
"""

import functools

import pytest
import torch

from hpcloss import functional, reference
from hpcloss.backends import blockwise, pieces, pytorch
from hpcloss.backends.blockwise import rows as packing
from hpcloss.backends.dense import rows as dense_rows
from hpcloss.operators import ops
from hpcloss.plan import native
from hpcloss.plan.partition import partition, partition_against
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.pair_lse import RULES, pair_lse, pair_lse_both
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, integers, rows, runs
from tests.tools.native_rows import (
    FORMS,
    PAIR,
    PAIRED,
    fast_contrast,
    losses_and_gradients,
    plain_contrast,
    watched,
)
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import OF_KEYS, OF_ONE_SET, PLANS, LargestTensor, Plan, allowed, as_rows, finite, inputs

pytestmark = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu"))

SCALES = (3.0, 0.5, -2.0, 90.0)
DENSE = ("dense", "dense, slopes made again", "dense, without the library")
PIECES = ("pieces", "pieces of few rows")


@pytest.fixture
def calls(monkeypatch):
    return watched(monkeypatch)


@pytest.fixture
def schedule(request, monkeypatch, calls):
    """The backend of rows, and the size of what it holds at once: of few pairs, it makes slopes again."""
    if request.param == "dense, slopes made again":
        monkeypatch.setattr(dense_rows, "MOST", 40)
        monkeypatch.setattr(pytorch, "kept_slopes", lambda at, num_keys: 0)
    if request.param == "dense, without the library":
        monkeypatch.setattr(native, "serves", lambda tensor: False)
    if request.param in PIECES:
        monkeypatch.setitem(pytorch.DENSE_UP_TO, "cpu", 0)
        monkeypatch.setattr(pieces, "MOST", 40 if request.param == "pieces of few rows" else pieces.MOST)
        return "pytorch"
    return "dense"


def serves(schedule, plan):
    """Whether the schedule has the library compute the plan: where there is a pair."""
    at = plan.pairs.intervals
    regions = [(a1 - a0) * (k1 - k0) for a0, a1, k0, k1 in zip(*(bound.tolist() for bound in at[3:]), strict=True)]
    return schedule != "dense, without the library" and any(regions)


@functools.cache
def expected(plan, form, value, same_upstream):
    """Of plain PyTorch, in fp32 and in float64."""
    arguments = PLANS[plan](), dict(form), value
    return [losses_and_gradients(plain_contrast, *arguments, x, same_upstream) for x in (torch.float32, torch.float64)]


def assert_contrast(plan, form, backend, value, same_upstream=False):
    found = losses_and_gradients(fast_contrast(backend), PLANS[plan](), form, value, torch.float32, same_upstream)
    eager, exact = expected(plan, tuple(form.items()), value, same_upstream)
    assert found[0].dtype == torch.float32 and torch.equal(found[1], exact[1])
    assert_within_budget(found[0], eager[0], exact[0], "loss")
    for grad, plain, right in zip(found[2], eager[2], exact[2], strict=True):
        assert_within_budget(grad, plain, right, "grad")


# ------------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [(name, plan) for name in DENSE for plan in PLANS] + [(name, plan) for name in PIECES for plan in OF_KEYS],
    indirect=["schedule"],
)
def test_contrast(schedule, plan, calls, request):
    forms = FORMS + [PAIR] * (plan in PAIRED)
    for form in forms:
        for value in SCALES:
            assert_contrast(plan, form, schedule, value)
    name = request.node.callspec.params["schedule"]
    at_least = len(forms) * len(SCALES) * (1 if name == "dense" else 2)  # the second time in backward
    assert calls["contrast"] >= at_least if serves(name, PLANS[plan]()) else calls["contrast"] == 0
