"""The operators over the kernels: schemas, determinism, memory, empty sets."""

import itertools
import math

import pytest
import torch

from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.scale import Scale
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.plans import (
    LargestTensor,
    as_rows,
    self_plan,
)
from tests.tools.problems import BACKWARD, OPS, Problem, calls, run

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["self", "cross with self"])
def test_deterministic_and_inputs_untouched(plan, dtype):
    for op, arguments in calls(plan, dtype):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        tensors += [x for some in arguments if isinstance(some, list) for x in some]
        before = [x.clone() for x in tensors]
        for first, second in zip(run(op, arguments), run(op, arguments), strict=True):
            assert torch.equal(first.view(torch.int32), second.view(torch.int32))
        assert all(torch.equal(x, old) for x, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("plan,dtype", [("self", torch.float16), ("cross with self", torch.float32)])
def test_schemas_and_fakes(plan, dtype):
    """Nothing written to, no aliases, and shapes and dtypes that the compiler is told are those that come."""
    for op, arguments in calls(plan, dtype):
        some = [arguments]
        if op in BACKWARD:
            some = [(*arguments[:-3], *needs) for needs in itertools.product((False, True), repeat=3)]
        for arguments in some:
            torch.library.opcheck(op.default, (*arguments, "triton"), test_utils=("test_schema", "test_faketensor"))


def test_schemas_and_fakes_of_both_directions():
    problem = Problem("one to one", torch.float16)
    sides, scale = (problem.anchors.to(DEVICE), problem.keys.to(DEVICE)), torch.tensor(2.0, device=DEVICE)
    arguments = (*sides, scale, 2.0, list(problem.pairs.intervals), "negatives")
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(OPS.pair_lse_both.default, (*arguments, "triton"), **tests)
    both = OPS.pair_lse_both(*arguments, "triton")
    for needs in itertools.product((False, True), repeat=3):
        backward = (*(torch.ones_like(x) for x in both), *both, *arguments, *needs, "triton")
        torch.library.opcheck(OPS.pair_lse_both_backward.default, backward, **tests)


def test_no_tensor_grows_with_the_square_of_the_rows():
    plan = self_plan(100, 1)
    for op, arguments in calls(plan, torch.float32):
        with LargestTensor() as largest:
            run(op, arguments)
        assert largest.numel <= 100 * 8


def test_empty_sets():
    """No key at all, no row at all, anchors without positives: -inf, 0 and no gradient."""
    for name in ("no keys", "no row", "only singletons"):
        problem = Problem(name, torch.float32)
        out, mass = pair_mean(
            as_rows(problem.anchors.to(DEVICE), "triton"), problem.pairs, "logit",
            Scale(torch.tensor(2.0, device=DEVICE)),
            keys=as_rows(problem.keys.to(DEVICE), "triton") if problem.cross else None,
        )  # fmt: skip
        assert (out == 0).all() and (mass == -math.inf).all()
