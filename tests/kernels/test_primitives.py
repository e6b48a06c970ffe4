"""The Triton kernels against the dense float64 form of the primitives, and one loss of each shape end to end.

The plain computation that sets the budget is the dense form in the tested dtype. Rows are unit rows where not said.
"""

import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from tests.primitives.test_backends import (
    PLANS,
    LargestTensor,
    Plan,
    allowed,
    as_rows,
    cross_plan,
    long_plan,
    self_plan,
)
from tests.tools.cases import choice, integers, rows, runs
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_within_budget

import hpcloss
from hpcloss import reference
from hpcloss.losses.image import UNFILLED
from hpcloss.operators import load
from hpcloss.plan.partition import Intervals, Pairs, partition
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import RULES, pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
OPS = torch.ops.hpcloss
BACKWARD = (OPS.pair_lse_backward, OPS.pair_mean_backward, OPS.pair_cross_entropy_backward)

make_plan = functools.cache(lambda name: (PLANS | EDGES)[name]())
allowed = functools.cache(allowed)


class Problem:
    """A plan with rows of one dtype, run by the kernels and, in float64 and in that dtype, by the dense form."""

    def __init__(self, plan, dtype, dim=7, length=1.0, seed=0):
        self.plan, self.dtype = make_plan(plan) if isinstance(plan, str) else plan, dtype
        self.pairs = self.plan.pairs.to(DEVICE)
        self.count = self.pairs.order.numel()
        self.num_keys = self.count if self.plan.num_keys is None else self.plan.num_keys
        self.cross = self.plan.num_keys is not None
        self.anchors = self.rows(self.count, dim, length, seed)
        self.keys = self.rows(self.num_keys, dim, length, seed + 1) if self.cross else None
        self.stat = torch.where(torch.arange(self.count) % 4 == 1, -math.inf, 4 * rows(self.count, seed=5)).to(dtype)
        self.bias = torch.where(torch.arange(self.num_keys) % 5 == 2, -math.inf, rows(self.num_keys, seed=11)).to(dtype)
        self.upstream = rows(self.count, seed=99, dtype=dtype)

    def rows(self, count, dim, length, seed):
        return (length * torch.nn.functional.normalize(rows(count, dim, seed=seed), dim=1)).to(self.dtype)

    def leaves(self, dtype, device="cpu"):
        """Anchors, and keys where they are others, as leaves."""
        some = (self.anchors, self.keys) if self.cross else (self.anchors,)
        return [x.to(device, dtype).requires_grad_() for x in some]

    def packed(self, companions, backend="triton"):
        """What the primitives take: rows of the tested dtype with companions in fp32."""
        data = (self.anchors, self.keys) if self.cross else (self.anchors,)
        some = [Rows(x.to(DEVICE), companion, backend) for x, companion in zip(data, companions, strict=True)]
        return some[0], some[1] if self.cross else None

    def rolled(self, leaves, shift):
        """Anchors and keys with their channels in another order: the same similarities, rounded otherwise."""
        x = leaves[0].roll(shift, 1)
        return x, leaves[1].roll(shift, 1) if self.cross else x

    def mask(self, rule, bias):
        mask = allowed(self.plan, rule)
        return mask if bias is None else mask & (bias > -math.inf)

    def pair_lse(self, rule, value, bound=None, biased=False, upstream=None, backend="triton"):
        """Check values and gradients; `bound` says that rows and scale keep to it. Returns the gradients."""
        bias = self.bias if biased else None
        companions = self.leaves(torch.float32, DEVICE)
        anchors, keys = self.packed(companions, backend)
        scale = torch.tensor(value, device=DEVICE, requires_grad=True)
        lse = pair_lse(
            anchors, self.pairs, rule, Scale(scale, bound), keys=keys,
            bias=None if bias is None else bias.float().to(DEVICE),
        )  # fmt: skip

        def dense(dtype, shift):
            leaves = [*self.leaves(dtype), _scale_of_rows(self.count, value, dtype)]
            x, others = self.rolled(leaves, shift)
            cast = None if bias is None else bias.to(dtype)
            return reference.pair_lse(x, others, self.mask(rule, bias), leaves[-1], cast), leaves

        return self.check("lse", lse, [*companions, scale], dense, upstream)

    def pair_mean(self, term, value, bound=None, hardness=0.0, discount=0.0, weighted=False, detach=True,
                  learnt=True, upstream=None, backend="triton"):  # fmt: skip
        """Check values, masses and gradients. `learnt`: whether the scale wants a gradient."""
        log_weight = self.bias if weighted else None
        companions = self.leaves(torch.float32, DEVICE)
        anchors, keys = self.packed(companions, backend)
        scale = torch.tensor(value, device=DEVICE, requires_grad=learnt)
        stat = self.stat.to(DEVICE, torch.float32).requires_grad_() if term == "own" else None
        options = {"hardness": hardness, "discount": discount, "detach_weights": detach, "term": term}
        out, mass = pair_mean(
            anchors, self.pairs, scale=Scale(scale, bound), keys=keys, stat=stat,
            log_weight=None if log_weight is None else log_weight.float().to(DEVICE), **options,
        )  # fmt: skip

        def dense(dtype, shift, what=0):
            leaves = [*self.leaves(dtype), _scale_of_rows(self.count, value, dtype)]
            x, others = self.rolled(leaves, shift)
            stat = self.stat.to(dtype).requires_grad_() if term == "own" else None
            cast = None if log_weight is None else log_weight.to(dtype)
            mask = self.mask("positives", log_weight)
            results = reference.pair_mean(x, others, mask, leaves[-1], stat=stat, log_weight=cast, **options)
            scale = leaves.pop()
            return results[what], [*leaves, *([] if stat is None else [stat]), *([scale] if learnt else [])]

        assert not mass.requires_grad
        exact_mass, _ = dense(torch.float64, 0, 1)
        assert_within_budget(mass, dense(self.dtype, 0, 1)[0], exact_mass, "lse")
        wanted = [*companions, *([] if stat is None else [stat]), *([scale] if learnt else [])]
        return self.check("loss", out, wanted, dense, upstream, exact_mass)

    def pair_cross_entropy(self, value, hardness=0.0, upstream=None, of_lse=False, backend="triton"):
        """Check losses, masses and gradients; of_lse: of both results together."""
        companions = self.leaves(torch.float32, DEVICE)
        anchors, keys = self.packed(companions, backend)
        scale = torch.tensor(value, device=DEVICE, requires_grad=True)
        loss, lse, mass = pair_cross_entropy(anchors, self.pairs, Scale(scale), keys=keys, hardness=hardness)

        def dense(dtype, shift, what=0):
            leaves = [*self.leaves(dtype), _scale_of_rows(self.count, value, dtype)]
            x, others = self.rolled(leaves, shift)
            positives = allowed(self.plan, "positives")
            lse = reference.pair_lse(x, others, allowed(self.plan, "others"), leaves[-1])
            mean, mass = reference.pair_mean(x, others, positives, leaves[-1], hardness, None, "logit")
            loss = torch.where(positives.any(1), finite(lse) - mean, 0.0)
            return (loss, lse, mass, loss + finite(lse))[what], leaves

        assert not mass.requires_grad and bool((loss >= 0).all())
        for found, what in ((lse, 1), (mass, 2)):
            assert_within_budget(found, dense(self.dtype, 0, what)[0], dense(torch.float64, 0, what)[0], "lse")
        leaves, exact_lse = [*companions, scale], dense(torch.float64, 0, 1)[0].detach()
        if of_lse:
            both = loss + finite(lse)
            return self.check("loss", both, leaves, functools.partial(dense, what=3), upstream, exact_lse)
        return self.check("loss", loss, leaves, dense, upstream, exact_lse)

    def check(self, kind, actual, leaves, dense, upstream, shared=None):
        """Compare with `dense(dtype, shift)`, which returns its values and leaves.

        shared: the logarithm by which the backward pass normalises, where it is not the value itself.
        """
        upstream = self.upstream if upstream is None else upstream
        assert actual.dtype == torch.float32
        grads = torch.autograd.grad(finite(actual), leaves, upstream.float().to(DEVICE))
        exact, exact_grads = _values_and_grads(*dense(torch.float64, 0), upstream)
        # On few rows the plain computation may be lucky. Its worst of three counts, each with other orders of channels
        # and with the log-sum that the passes share as it is, one place up or one down: a factor of the row's gradient.
        place = 1 + 1.2e-7 * finite(exact if shared is None else shared).abs()
        plain = [
            _values_and_grads(*dense(self.dtype, shift), upstream.double() * factor)
            for shift, factor in enumerate((torch.ones_like(place), place, 1 / place))
        ]
        assert_within_budget(actual, _worst([values for values, _ in plain], exact), exact, kind)
        plain_grads = zip(*(some for _, some in plain), strict=True)
        for grad, some, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
            assert grad.dtype == torch.float32
            if not grad.dim():
                # A sum whose terms may cancel is as exact as they are.
                size = exact_grad.abs().sum()
                grad, exact_grad, *some = (
                    torch.stack([x.double().sum().cpu(), size]) for x in (grad, exact_grad, *some)
                )
            assert_within_budget(grad, _worst(some, exact_grad), exact_grad, "grad", self.dtype)
        return grads


def _scale_of_rows(count, value, dtype):
    """One scale for each row: the gradient of the scale is the sum of theirs."""
    return torch.full((count, 1), value, dtype=dtype, requires_grad=True)


def _values_and_grads(values, leaves, upstream):
    """Values, and gradients in float64. They are taken for an upstream gradient of order 1, which every dtype holds."""
    factor = upstream.double().abs().max().clamp(min=1e-30) if upstream.numel() else torch.ones(())
    grads = torch.autograd.grad(
        finite(values), leaves, (upstream.double() / factor).to(values.dtype), allow_unused=True
    )
    grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]
    return values.detach(), [grad.double() * factor for grad in grads]


def _worst(plain, exact):
    """Of several results the one farthest from the exact one."""
    errors = [torch.where(exact.isfinite(), (x.double() - exact).abs(), 0.0).sum() for x in plain]
    return plain[int(torch.stack(errors).argmax())]


def finite(values):
    """-inf is the defined value of an empty set and has no gradient."""
    return torch.where(values == -math.inf, 0.0, values)


# ------------------------------------------------------------------------------------------------------- every plan

# scale, bound, biased
OPTIONS_OF_LSE = [
    (-2.0, None, False),
    (0.0, 1.0, False),
    (0.7, None, True),
    (90.0, None, False),
    (60.0, 60.0, False),
    (0.7, 20.0, True),
]
# Nothing can overflow in either pass, in the forward pass alone, perhaps in both.
BOUNDS = [{"bound": 2.5, "learnt": False}, {"bound": 60.0, "learnt": False}, {}, {"bound": 2.5}]
OPTIONS_OF_MEAN = [
    {"term": term, "discount": discount, "hardness": hardness, "weighted": weighted, "detach": detach}
    for term, discount in (("logit", 0.0), ("own", 0.0), ("own", 0.4))
    for hardness, weighted in ((0.0, False), (1.5, False), (-20.0, False), (0.0, True), (0.8, True))
    for detach in ((True, False) if hardness else (True,))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", PLANS)
def test_pair_lse(plan, rule, dtype):
    """Both variants for each plan and rule in fp32, one of them in half precision; the other options in turn."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan) + RULES.index(rule)
    if dtype == torch.float32 or turn % 2:
        problem.pair_lse(rule, 3.0, bound=3.0)
    if dtype == torch.float32 or not turn % 2:
        problem.pair_lse(rule, 3.0)
    if dtype == torch.float32 or not turn % 3:
        problem.pair_lse(rule, *OPTIONS_OF_LSE[turn % len(OPTIONS_OF_LSE)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_pair_mean(plan, dtype):
    """Half of the options with each plan, in half precision a sixth; the four bounds in turn, the first one always."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan)
    hardness, discount = (0.0, 1.5, -20.0)[turn % 3], (0.0, 0.4)[turn % 2]
    problem.pair_mean("own", 2.5, hardness=hardness, discount=discount, **BOUNDS[0])
    for number, options in enumerate(OPTIONS_OF_MEAN):
        if (number + turn) % (2 if dtype == torch.float32 else 6) == 0:
            problem.pair_mean(value=2.5, **options, **BOUNDS[(number // 2 + turn) % len(BOUNDS)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_pair_cross_entropy(plan, dtype):
    """Uniform weights always, others in turn; the gradient of the loss alone and of both results."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan)
    problem.pair_cross_entropy((3.0, 60.0)[turn % 2])
    problem.pair_cross_entropy((20.0, 0.5)[turn % 2], (1.5, -20.0)[turn // 2 % 2], of_lse=bool(turn % 2))
    if dtype == torch.float32:
        problem.pair_cross_entropy(-2.0, (0.0, 1.5)[turn % 2], of_lse=not turn % 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["self", "cross with self"])
@pytest.mark.parametrize("detach", [True, False])
def test_weights_of_prototypes(plan, dtype, detach):
    """PCCS at temperature 0.01: weights e^(100 s), finite in half precision."""
    problem = Problem(plan, dtype)
    for term in ("own", "logit"):
        for bound in (None, 100.0):
            problem.pair_mean(term, 100.0, bound, hardness=-100.0, detach=detach)


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


# ------------------------------------------------------------------------------------------------------- edges, sizes


def regions_plan(sizes, labels, background=0):
    """Regions of these sizes, each with the labels of its turn, repeated."""
    of_pixel = [labels[region % len(labels)][i % len(labels[region % len(labels)])]
                for region, size in enumerate(sizes) for i in range(size)]  # fmt: skip
    pairs = partition(torch.tensor(of_pixel), runs(*sizes), len(sizes), background=background, ignore_index=(255,))
    return Plan(pairs, None)


def keys_on_both_sides_plan():
    pairs, _ = long_plan(20, 16, 17, 11, background=0)
    return Plan(pairs.replace(anchor_end=torch.tensor([50], dtype=torch.int32)), None)


def intervals_plan():
    """Every bound at, one before and one after the edge of a block; intervals of no, one and all keys."""
    bounds = [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49]
    spans = [(a, b) for i, a in enumerate(bounds) for b in (bounds[i], *bounds[i + 1 :: 3], a + 1)]
    anchors = [(0, 15), (16, 17), (17, 33), (33, 33), (33, len(spans))]
    keys = [(0, 50), (15, 33), (16, 32), (0, 50), (1, 49)]
    start, end = (torch.zeros(len(spans), dtype=torch.int32) for _ in range(2))
    for (first, last), (low, high) in zip(anchors, keys, strict=True):
        for i in range(first, last):
            start[i], end[i] = (min(max(bound, low), high) for bound in spans[i])
    own = torch.arange(len(spans), dtype=torch.int32) % 50
    own[::3] = -1
    at = (torch.tensor(bound, dtype=torch.int32) for interval in (anchors, keys) for bound in zip(*interval))
    return Plan(Pairs(torch.arange(len(spans), dtype=torch.int32), Intervals(start, end, own, *at)), 50)


EDGES = {
    "runs": lambda: long_plan(15, 17, 17, 14, 1, 1, 15, 16),  # edges at 15, 32, 49, 63, 64, 65, 80, 96
    "whole blocks": lambda: long_plan(16, 32, 16),
    "blocks less one": lambda: long_plan(15, 16, 16, background=0),
    "blocks and one": lambda: long_plan(17, 16, 16),
    "regions": lambda: regions_plan([15, 3, 14, 17, 14, 1, 32, 0, 31], [[0, 1, 1, 2], [1, 2], [3]]),
    "regions without anchors": lambda: regions_plan([20, 16, 9, 1, 17], [[0, 1, 1, 2], [0], [255], [3], [0, 3, 3, 4]]),
    "mostly background": lambda: regions_plan([41, 40], [[0, 0, 0, 0, 0, 0, 0, 0, 1, 2]]),
    "keys on both sides": keys_on_both_sides_plan,
    "dead tail": lambda: regions_plan([30, 45], [[1, 2, 2, 0], [255]]),
    "intervals": intervals_plan,
}


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=lambda shape: "x".join(map(str, shape)))
def tile(request, monkeypatch):
    """Kernels in tiles of this shape, on a GPU too."""
    backend = load("triton")
    config = backend.configs.INTERPRETED._replace(block_i=request.param[0], block_j=request.param[1])
    monkeypatch.setattr(backend, "config", lambda *_, **__: config)
    return request.param


@pytest.mark.parametrize("plan", EDGES)
def test_edges(plan, tile):
    problem = Problem(plan, torch.float32)
    for number, rule in enumerate(RULES):
        if tile == (16, 16) or rule in ("positives", "negatives"):
            problem.pair_lse(rule, 3.0, bound=(3.0, None)[number % 2])
    problem.pair_mean("own", 2.5, hardness=1.5, detach=False)
    if tile == (16, 16):
        problem.pair_mean("own", 2.5, bound=2.5, hardness=1.5, learnt=False)
        Problem(plan, torch.float16).pair_mean("logit", 2.5, bound=2.5, hardness=-2.0)


SIZES = [(1, 257, 1), (2, 33, 64), (15, 16, 7), (16, 15, 100), (17, 1, 16), (31, 2, 7), (33, 31, 100), (257, 17, 16)]
SIZES += [] if DEVICE.type == "cpu" else [(1025, 2047, 128), (700, 1300, 512)]


@pytest.mark.parametrize("n,m,dim", SIZES)
@pytest.mark.parametrize("cross", [False, True])
def test_sizes(n, m, dim, cross):
    plan = cross_plan(n, m, 2, with_self=True, seed=n) if cross else self_plan(n, 1, seed=n)
    rule, dtype = RULES[(n + m) % 4], DTYPES[(n + dim) % 2]
    Problem(plan, torch.float32, dim).pair_lse("negatives", 3.0, bound=3.0)
    Problem(plan, dtype, dim).pair_lse(rule, 3.0)
    Problem(plan, DTYPES[(n + dim + 1) % 2], dim).pair_mean("own", 2.5, hardness=1.5, detach=False)


# ------------------------------------------------------------------------------------------------- incoming gradients


def calls(plan, dtype):
    """Both primitives and their backward passes as the backend knows them: (operator, arguments without `backend`)."""
    problem = Problem(plan, dtype)
    x, keys = problem.anchors.to(DEVICE), problem.keys.to(DEVICE) if problem.cross else None
    bias, stat, grad = (v.float().to(DEVICE) for v in (problem.bias, problem.stat, problem.upstream))
    scale, at = torch.tensor(2.0, device=DEVICE), list(problem.pairs.intervals)
    for rule, some_bias, bound in (("others", None, 2.0), ("negatives", bias, None), ("positives", None, None)):
        arguments = (x, keys, some_bias, scale, bound, at, rule)
        yield OPS.pair_lse, arguments
        lse = OPS.pair_lse(*arguments, "triton")
        yield OPS.pair_lse_backward, (grad, lse, *arguments, True, True, True)
    for some_stat, weight, bound, hardness, discount in (
        (None, None, None, 0.0, 0.0), (stat, None, 2.0, 1.5, 0.4), (stat, bias, None, -3.0, 0.0)
    ):  # fmt: skip
        options = (some_stat, weight, scale, bound, hardness, discount)
        yield OPS.pair_mean, (x, keys, *options, at)
        out, mass, _ = OPS.pair_mean(x, keys, *options, at, "triton")
        yield OPS.pair_mean_backward, (grad, out, mass, x, keys, *options, bound == 2.0, at, True, True, bound is None)
    for hardness, grad_lse in ((0.0, None), (1.5, grad.flip(0))):
        yield OPS.pair_cross_entropy, (x, keys, scale, None, hardness, at)
        _, _, *row_statistics = OPS.pair_cross_entropy(x, keys, scale, None, hardness, at, "triton")
        arguments = (grad, grad_lse, *row_statistics, x, keys, scale, None, hardness, at, True, True, True)
        yield OPS.pair_cross_entropy_backward, arguments


def run(op, arguments):
    results = op(*arguments, "triton")
    return results if isinstance(results, tuple | list) else (results,)


PASSES = {
    "lse": lambda problem, **more: problem.pair_lse("others", 10.0, bound=10.0, **more),
    "lse, online": lambda problem, **more: problem.pair_lse("negatives", 10.0, **more),
    "mean": lambda problem, **more: problem.pair_mean("own", 10.0, 10.0, 1.0, learnt=False, **more),
    "mean, uniform": lambda problem, **more: problem.pair_mean("logit", 10.0, **more),
    "cross-entropy": lambda problem, **more: problem.pair_cross_entropy(10.0, **more),
    "cross-entropy, weights": lambda problem, **more: problem.pair_cross_entropy(10.0, 1.5, of_lse=True, **more),
    "mean, weights": lambda problem, **more: problem.pair_mean("own", 20.0, hardness=-20.0, detach=False, **more),
}


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


# -------------------------------------------------------------------------------------------------------- whole losses


def _map(dtype):
    return [rows(2, 6, 8, 7, dtype=dtype)], [choice([0, 1, 1, 2, 255], 2, 8, 7)]


def _vectors(dtype, count=1, labelled=True):
    vectors = [rows(21 + 3 * i, 6, seed=i, dtype=dtype) for i in range(count)]
    labels = [choice([0, 1, 1, 2, -1], len(x), seed=i) for i, x in enumerate(vectors)]
    return vectors, labels if labelled else []


def _views(dtype, count=2):
    return [rows(19, 6, seed=i, dtype=dtype) for i in range(count)], []


def _keys(loss):
    return lambda x, k, labels, key_labels, **options: loss(x, labels, k, key_labels, **options)


def _bank(loss):
    def call(a, b, bank, **options):
        return loss(a, b, integers(4, 19).to(a.device), bank=bank.detach(),
                    bank_groups=choice([0, 1, 9, UNFILLED], len(bank)).to(a.device), **options)  # fmt: skip

    return call


def _plain(loss):
    return loss


# loss, inputs, how it takes them, options; "learnt" stands for a temperature with a gradient
LOSSES = {
    "phpc": ("region_phpc", _map, _plain, {"region_size": 4}),
    "phpc, hardness 0": ("region_phpc", _map, _plain, {"region_size": (4, 3), "hardness": 0.0, "reduction": "region"}),
    "phpc, weights": ("region_phpc", _map, _plain,
                      {"region_size": 4, "detach_weights": False, "discount": 0.4, "learnt": 0.2}),
    "phpc, all": ("region_phpc", _map, _plain, {"region_size": None, "denominator": "all", "background": None}),
    "phpc, negatives": ("region_phpc", _map, _plain,
                        {"region_size": 4, "denominator": "negatives", "hardness": -20.0, "per_image": True}),
    "phpc, local": ("region_phpc", _map, _plain, {"region_size": 4, "local_size": (2, 4), "temperature": 0.07}),
    "phpc, raw": ("region_phpc", _map, _plain, {"region_size": 4, "normalize": False, "temperature": 1.0}),
    "region supcon": ("region_supcon", _map, _plain, {"region_size": 4, "learnt": 0.1}),
    "supcon": ("supcon", _vectors, _plain, {"temperature": 0.07}),
    "supcon, in": ("supcon", _vectors, _plain, {"form": "in", "learnt": 0.1}),
    "supcon, keys": ("supcon", lambda dtype: _vectors(dtype, 2), _keys, {"learnt": 0.1}),
    "supcon, in, keys": ("supcon", lambda dtype: _vectors(dtype, 2), _keys, {"form": "in"}),
    "ntxent": ("ntxent", _views, _plain, {}),
    "hard negatives": ("hard_negative_nce", _views, _plain, {}),
    "infonce": ("infonce", _views, _plain, {"learnt": 0.1}),
    "infonce, symmetric": ("infonce", _views, _plain, {"symmetric": True, "learnt": 0.1}),
    "infonce, negatives": ("infonce", lambda dtype: _views(dtype, 3), _plain, {}),
    "ihpc": ("ihpc", _views, _plain, {"hardness": 2.0, "learnt": 0.3}),
    "ihpc, bank": ("ihpc", lambda dtype: _views(dtype, 3), _bank, {}),
}  # fmt: skip


def value_and_grads(call, inputs, dtype, device, options):
    """Loss and gradients of the features, and of a temperature that is learnt."""
    vectors, labels = inputs
    leaves = [x.to(device, dtype).requires_grad_() for x in vectors]
    options = dict(options)
    wanted = leaves[: -1 if "bank" in call.__qualname__ else None]
    if "learnt" in options:
        options["temperature"] = torch.tensor(options.pop("learnt"), device=device).to(dtype).requires_grad_()
        wanted = [*wanted, options["temperature"]]
    value = call(*leaves, *[x.to(device) for x in labels], **options)
    return value.detach(), torch.autograd.grad(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES, ids=[f"{name} ({case[0]})" for name, case in LOSSES.items()])
def test_losses(name, dtype):
    """Against blockwise in float64, which other tests prove."""
    loss, make, how, options = LOSSES[name]
    if dtype != torch.float32 and not options.get("normalize", True):
        pytest.skip("raw rows may be packed in a dtype coarser than theirs")
    inputs = make(dtype)
    value, grads = value_and_grads(how(FAST[loss]), inputs, dtype, DEVICE, options | {"backend": "triton"})
    exact, exact_grads = value_and_grads(
        how(FAST[loss]), inputs, torch.float64, "cpu", options | {"backend": "blockwise"}
    )
    plain, plain_grads = value_and_grads(how(ORACLE[loss]), inputs, dtype, "cpu", options)
    assert value.dtype == torch.float32 and exact.abs() > 0
    assert_within_budget(value, plain, exact, "loss")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


def modules():
    (x,), (labels,) = _map(torch.float32)
    a, b = _views(torch.float32)[0]
    return {
        "phpc": (hpcloss.RegionPHPCLoss(4, backend="triton"), (x, labels)),
        "phpc, classes": (
            hpcloss.RegionPHPCLoss(4, num_classes=3, detach_weights=False, backend="triton"), (x.half(), labels)
        ),
        "infonce": (hpcloss.InfoNCELoss(learnable=True, backend="triton"), (a, b)),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", modules())
def test_compile_without_a_graph_break(name):
    module, inputs = modules()[name]
    module, inputs = module.to(DEVICE), [x.to(DEVICE) for x in inputs]
    results = []
    torch._dynamo.reset()
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        loss = call(*leaves)
        wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- what a process may be set to


def unit_rows(*shape, seed=0, dtype=torch.float32):
    return torch.nn.functional.normalize(rows(*shape, seed=seed), dim=1).to(DEVICE, dtype)


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_the_default_dtype_changes_nothing():
    """Half precision as default would hold no lift beyond 65504."""
    labels = choice([0, 1, 2], 64).to(DEVICE)
    function = functools.partial(FAST["supcon"], labels=labels, backend="triton")
    x = unit_rows(64, 7, dtype=torch.float16)
    expected = gradient(lambda x: function(x) / 1024, x)
    torch.set_default_dtype(torch.float16)
    try:
        actual = gradient(lambda x: function(x) / 1024, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one setting alone"
)
def test_either_setting_of_fp32_products():
    from hpcloss.backends.triton import configs

    x = torch.zeros(1, 4)
    with (
        mock.patch.object(configs, "capability", lambda device: 90),
        mock.patch.object(configs, "interpreted", lambda: False),
    ):
        assert configs.precision(x) == "ieee" and configs.precision(x.half()) == "half"
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # now `torch.get_float32_matmul_precision` raises
            assert configs.precision(x) == "tf32" and configs.precision(x.half()) == "half"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_two_dtypes(dtypes):
    """Both sides are multiplied in the dtype of the queries."""
    x, y = unit_rows(20, 7, dtype=dtypes[0]), unit_rows(20, 7, seed=1, dtype=dtypes[1])
    for options in ({}, {"symmetric": True}):
        value = functools.partial(FAST["infonce"], temperature=0.5, **options)
        for of_x in (True, False):
            pair = (lambda z, cast: (z, cast(y))) if of_x else (lambda z, cast: (cast(x), z))
            side = x if of_x else y
            actual = gradient(lambda z: value(*pair(z, lambda other: other), backend="triton"), side)  # noqa: B023
            exact = gradient(lambda z: value(*pair(z, torch.Tensor.double)), side.double())  # noqa: B023
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=3e-3 * exact.abs().max().item())
    with pytest.raises(NotImplementedError, match="float64 needs backend 'blockwise'"):
        FAST["infonce"](x, y.double(), backend="triton")


def test_vectors_of_any_stride_and_dtype():
    problem = Problem("self", torch.float32)
    x, at = problem.anchors.to(DEVICE), list(problem.pairs.intervals)
    scale, n = torch.tensor(2.0, device=DEVICE), problem.count
    for vector in (rows(n, 2, dtype=torch.float32)[:, 0], rows(1, dtype=torch.float32).expand(n), rows(n)):
        vector = vector.to(DEVICE)
        plain = vector.float().contiguous()
        for some in (vector, plain):
            lse = OPS.pair_lse(x, None, some, scale.to(some.dtype), None, at, "others", "triton")
            mean = OPS.pair_mean(x, None, some, some, scale.to(some.dtype), None, 1.0, 0.0, at, "triton")
            if some is vector:
                first = (lse, *mean)
        assert all(torch.equal(a, b) for a, b in zip(first, (lse, *mean)))


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


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # a GPU says nothing
@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_nan_among_positives(hardness):
    """It shows in the loss of every anchor that meets it."""
    features = rows(1, 16, 6, 6, dtype=torch.float32).to(DEVICE)
    features[0, :, 2, 3] = torch.nan
    labels = torch.ones(1, 6, 6, dtype=torch.int64, device=DEVICE)
    options = {"denominator": "all", "hardness": hardness, "reduction": "none", "backend": "triton"}
    assert hpcloss.region_phpc_loss(features, labels, **options).isnan().all()
