"""Incoming gradients of every size, and gradients that nobody wants."""

import math

import pytest
import torch

from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.problems import BACKWARD, OPS, PASSES, Problem, calls, run

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("plan", ["self", "cross with self"])
@pytest.mark.parametrize("name", PASSES)
def test_gradients_at_the_weights_of_a_large_mean(name, plan):
    """A mean over 524 288 rows: fp16 slopes that small would be lost."""
    problem = Problem(plan, torch.float16)
    ones = torch.ones(problem.count)
    of_mean = PASSES[name](problem, upstream=ones / 524288)
    of_sum = PASSES[name](problem, upstream=ones)
    for small, large in zip(of_mean, of_sum, strict=True):
        torch.testing.assert_close(small * 524288, large, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_incoming_gradients(name, dtype):
    problem = Problem("self", dtype)
    anchor = int(problem.plan.pairs.intervals.is_anchor().nonzero()[3])
    some = problem.upstream.float().clone()
    some[anchor] = 0.0
    PASSES[name](problem, upstream=some)
    some[anchor] = 65536.0 * 1024  # a loss scaler's, of one row
    PASSES[name](problem, upstream=some)
    grads = PASSES[name](problem, upstream=torch.zeros_like(some))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["self", "cross with self"])
def test_an_infinite_incoming_gradient_is_seen(plan, dtype):
    """A loss scaler that went too far must find out from the gradients."""
    for op, arguments in calls(plan, dtype):
        if op in BACKWARD:
            grad = torch.full_like(arguments[0], math.inf)
            assert not run(op, (grad, *arguments[1:]))[0].isfinite().all()


# --------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("plan", ["self", "cross with self"])
def test_unneeded_gradients_are_not_computed(plan):
    for op, arguments in calls(plan, torch.float32):
        if op not in BACKWARD:
            continue
        *arguments, _, _, _ = arguments
        wanted = run(op, (*arguments, True, True, True))
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            some = run(op, (*arguments, *needs))
            if "cross" in plan:
                needed = (needs[0], needs[1])
            else:  # one sum, the keys being the anchors
                needed = (needs[0], False)
            for want, got, full in zip(needed, some[:2], wanted[:2], strict=True):
                if want:
                    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5 * full.abs().max().item())
                else:
                    assert got.numel() in (0, full.numel())
            if needs[2]:
                torch.testing.assert_close(some[2], wanted[2])
            assert len({x.data_ptr() for x in some if x.numel()}) == sum(x.numel() > 0 for x in some)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_the_gradient_of_a_row_without_pairs_means_nothing(value):
    problem = Problem("self", torch.float16)
    x, at = problem.anchors.to(DEVICE), list(problem.pairs.intervals)
    scale, dead = torch.tensor(2.0, device=DEVICE), ~problem.pairs.intervals.is_anchor()
    grads = [torch.full((problem.count,), 1e-9, device=DEVICE).masked_fill(dead, some) for some in (0.0, value)]
    lse = OPS.pair_lse(x, None, None, scale, None, at, "every", "triton")
    out, mass, _ = OPS.pair_mean(x, None, lse, None, scale, None, 1.0, 0.0, at, "triton")
    of_both = OPS.pair_cross_entropy(x, None, scale, None, 0.0, at, "triton")[2:]
    for op, arguments in (
        (OPS.pair_lse_backward, (lse, x, None, None, scale, None, at, "every")),
        (OPS.pair_mean_backward, (out, mass, x, None, lse, None, scale, None, 1.0, 0.0, True, at)),
        (OPS.pair_cross_entropy_backward, (None, *of_both, x, None, scale, None, 0.0, at)),
        (OPS.pair_cross_entropy_backward, (grads[1], *of_both, x, None, scale, None, 0.0, at)),
    ):
        expected, actual = (op(grad, *arguments, True, False, False, "triton")[0] for grad in grads)
        assert dead.any() and expected.abs().sum() > 0 and torch.equal(actual, expected)


def test_the_largest_gradient_lifts_all_slopes(monkeypatch):
    """Of all rows, in several blocks of them; where all have the same, as under a mean, one number is read."""
    from hpcloss.backends.triton import launch

    monkeypatch.setattr(launch, "ROWS", 16)
    problem = Problem("self", torch.float16)
    x, at, n = problem.anchors.to(DEVICE), list(problem.pairs.intervals), problem.count
    scale = torch.tensor(2.0, device=DEVICE)
    lse = OPS.pair_lse(x, None, None, scale, None, at, "every", "triton")
    out, mass, _ = OPS.pair_mean(x, None, lse, None, scale, None, 1.0, 0.0, at, "triton")
    of_both = OPS.pair_cross_entropy(x, None, scale, None, 0.0, at, "triton")[2:]
    beside = torch.tensor([1e30, 1e-9, *[1e30] * n], device=DEVICE)
    one = beside[1:2].expand(n)
    first = torch.arange(n, device=DEVICE) <= n // launch.ROWS  # as many rows as there are blocks
    small_first, no_first = (torch.ones(n, device=DEVICE).masked_fill(first, g) for g in (1e-30, 0.0))
    of_lse = torch.ones(n, device=DEVICE).index_fill(0, torch.arange(launch.ROWS, device=DEVICE), 1e-9)
    assert n > 2 * launch.ROWS and one.stride() == (0,)
    for op, arguments in (
        (OPS.pair_lse_backward, (lse, x, None, None, scale, None, at, "every")),
        (OPS.pair_mean_backward, (out, mass, x, None, lse, None, scale, None, 1.0, 0.0, True, at)),
        (OPS.pair_cross_entropy_backward, (None, *of_both, x, None, scale, None, 0.0, at)),
        (OPS.pair_cross_entropy_backward, (of_lse, *of_both, x, None, scale, None, 0.0, at)),
    ):
        for of_rows, same_of_rows in ((one, one.contiguous()), (small_first, no_first)):
            actual, expected = (op(g, *arguments, True, False, False, "triton")[0] for g in (of_rows, same_of_rows))
            assert expected.abs().sum() > 0 and torch.equal(actual, expected)
