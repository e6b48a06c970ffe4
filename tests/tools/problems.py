"""A plan with rows of one dtype, run by the kernels and by the dense form, and comparisons of the two.

The plain computation that sets the budget is the dense form in the tested dtype. Rows are unit rows where not said.
"""

import functools
import math

import torch

from hpcloss import reference
from hpcloss.plan.partition import Intervals, Pairs, partition
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import RULES, pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale
from tests.tools.cases import rows, runs
from tests.tools.kernels import DEVICE
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import (
    PLANS,
    Plan,
    allowed,
    long_plan,
)

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


def check_pair_lse(plan, rule, dtype):
    """Both variants for each plan and rule in fp32, one of them in half precision; the other options in turn."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan) + RULES.index(rule)
    if dtype == torch.float32 or turn % 2:
        problem.pair_lse(rule, 3.0, bound=3.0)
    if dtype == torch.float32 or not turn % 2:
        problem.pair_lse(rule, 3.0)
    if dtype == torch.float32 or not turn % 3:
        problem.pair_lse(rule, *OPTIONS_OF_LSE[turn % len(OPTIONS_OF_LSE)])


def check_pair_mean(plan, dtype):
    """Half of the options with each plan, in half precision a sixth; the four bounds in turn, the first one always."""
    problem, turn = Problem(plan, dtype), list(PLANS).index(plan)
    hardness, discount = (0.0, 1.5, -20.0)[turn % 3], (0.0, 0.4)[turn % 2]
    problem.pair_mean("own", 2.5, hardness=hardness, discount=discount, **BOUNDS[0])
    for number, options in enumerate(OPTIONS_OF_MEAN):
        if (number + turn) % (2 if dtype == torch.float32 else 6) == 0:
            problem.pair_mean(value=2.5, **options, **BOUNDS[(number // 2 + turn) % len(BOUNDS)])


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
