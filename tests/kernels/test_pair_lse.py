"""`pair_lse` of rows with themselves, and of both directions, on the kernels against its dense form."""

import pytest
import torch

from hpcloss import reference
from hpcloss.primitives.pair_lse import RULES, pair_lse_both
from hpcloss.primitives.scale import Scale
from tests.tools.cases import rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.plans import OF_ONE_SET
from tests.tools.problems import Problem, allowed, check_pair_lse

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", OF_ONE_SET)
def test_pair_lse(plan, rule, dtype):
    check_pair_lse(plan, rule, dtype)


@pytest.mark.parametrize("hardness", [30.0, -30.0])
def test_far_apart_rows(hardness):
    """Weights of pairs that do not count would overflow; they leave no NaN behind."""
    problem = Problem("self", torch.float32, length=12.0)
    for rule in RULES:
        problem.pair_lse(rule, 1.5)
    for term in ("logit", "own"):
        problem.pair_mean(term, 1.0, hardness=hardness)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "plan, rule",
    [
        *((plan, "every") for plan in ("one to one", "labelled keys", "keys in any order", "cells", "no keys")),
        ("one to one", "negatives"),
    ],
)
def test_pair_lse_both(plan, rule, dtype):
    """Sums over the rows and over the columns of one matrix; regions share no key."""
    problem = Problem(plan, dtype)
    mask, upstream = allowed(problem.plan, rule), rows(problem.count + problem.num_keys, seed=98, dtype=dtype)
    for value, bound in ((3.0, 3.0), (3.0, None), (-2.0, None), (60.0, 60.0)):
        companions = problem.leaves(torch.float32, DEVICE)
        anchors, keys = problem.packed(companions)
        scale = torch.tensor(value, device=DEVICE, requires_grad=True)
        both = pair_lse_both(anchors, keys, problem.pairs, rule, Scale(scale, bound))

        def dense(cast, shift, value=value):
            leaves = [*problem.leaves(cast), torch.tensor(value, dtype=cast, requires_grad=True)]
            x, others = problem.rolled(leaves, shift)
            sides = reference.pair_lse(x, others, mask, leaves[-1]), reference.pair_lse(others, x, mask.T, leaves[-1])
            return torch.cat(sides), leaves

        problem.check("lse", torch.cat(both), [*companions, scale], dense, upstream)
