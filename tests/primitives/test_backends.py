"""The two primitives on each backend and schedule against their dense float64 form. No loss is known here."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch

from hpcloss import reference
from hpcloss.backends import blockwise, resolve
from hpcloss.backends.blockwise import tiles
from hpcloss.plan.partition import Intervals, Pairs, one_to_one, partition, partition_against
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import RULES, pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, integers, rows
from tests.tools.numerics import assert_exact, assert_within_budget
from tests.tools.plans import (
    NOISE,
    PLANS,
    LargestTensor,
    Plan,
    allowed,
    as_rows,
    compare,
    cross_plan,
    finite,
    inputs,
    long_plan,
    self_plan,
    some_bias,
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", RULES)
def test_pair_lse(plan, rule, schedule):
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    mask = allowed(plan, rule)
    for value, bias, bound in ((3.0, None, None), (3.0, None, 100.0), (-2.0, None, None), (0.0, None, 1.0),
                               (0.7, some_bias(mask.shape[1]), None), (0.7, some_bias(mask.shape[1]), 20.0),
                               (90.0, None, None)):  # fmt: skip
        scale = torch.tensor(value).double().requires_grad_()
        actual = pair_lse(as_rows(anchors), plan.pairs, rule, Scale(scale, bound), keys=as_rows(keys), bias=bias)
        there = mask if bias is None else mask & (bias > -math.inf)
        expected = reference.pair_lse(anchors, anchors if keys is None else keys, there, scale, bias)
        compare(actual, expected, [x for x in (anchors, keys, scale) if x is not None])


@pytest.mark.parametrize(
    "plan, rule",
    [
        *((plan, "every") for plan in ("one to one", "labelled keys", "keys in any order", "cells", "no keys")),
        ("one to one", "negatives"),
    ],
)
def test_pair_lse_both(plan, rule, schedule):
    """Regions that share no key: the sums over rows and over columns of one matrix."""
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    mask = allowed(plan, rule)
    for value, bound in ((3.0, None), (3.0, 100.0), (-2.0, None), (90.0, None)):
        scale = torch.tensor(value).double().requires_grad_()
        actual = pair_lse_both(as_rows(anchors), as_rows(keys), plan.pairs, rule, Scale(scale, bound))
        expected = (
            reference.pair_lse(anchors, keys, mask, scale, None),
            reference.pair_lse(keys, anchors, mask.T, scale, None),
        )
        compare(torch.cat(actual), torch.cat(expected), [anchors, keys, scale])


def test_pair_lse_both_of_one_row(schedule):
    """A single row is a contiguous column as well."""
    x, keys = (value.requires_grad_() for value in (rows(1, 5), rows(9, 5, seed=1)))
    pairs = one_to_one(1, x.device).replace(key_end=torch.tensor([9], dtype=torch.int32))
    found = pair_lse_both(as_rows(x), as_rows(keys), pairs, "every", Scale(torch.tensor(3.0).double()))
    logits = 3 * x @ keys.T
    compare(torch.cat(found), torch.cat([logits.logsumexp(1), logits.logsumexp(0)]), [x, keys])


def test_pair_lse_both_refuses_rules_it_has_no_intervals_for():
    anchors, keys = inputs(PLANS["labelled keys"]())
    for rule, message in (
        ("others", "rule must be"),
        ("negatives", "keys must be as many as anchors .*, got 47 and 33"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_lse_both(
                as_rows(anchors), as_rows(keys), PLANS["labelled keys"]().pairs, rule, Scale(torch.tensor(1.0))
            )


def dense_cross_entropy(anchors, keys, plan, scale, hardness=0.0):
    """loss, lse and mass from their definitions."""
    others, positives = allowed(plan, "others"), allowed(plan, "positives")
    lse = reference.pair_lse(anchors, keys, others, scale)
    mean, mass = reference.pair_mean(anchors, keys, positives, scale, hardness, None, "logit")
    return torch.where(positives.any(1), finite(lse) - mean, 0.0), lse, mass


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("hardness", [0.0, 1.5, -20.0])
def test_pair_cross_entropy(plan, hardness, schedule):
    plan = PLANS[plan]()
    anchors, keys = inputs(plan)
    for value, bound in ((3.0, None), (3.0, 100.0), (0.01, 1.0), (90.0, None)):
        scale = torch.tensor(value).double().requires_grad_()
        options = {"keys": as_rows(keys), "hardness": hardness}
        loss, lse, mass = pair_cross_entropy(as_rows(anchors), plan.pairs, Scale(scale, bound), **options)
        expected = dense_cross_entropy(anchors, anchors if keys is None else keys, plan, scale, hardness)
        assert not mass.requires_grad
        assert_exact(mass, expected[2], floor=NOISE)
        assert bool((loss >= 0).all())
        leaves = [x for x in (anchors, keys, scale) if x is not None]
        of_loss = [torch.autograd.grad((3 * x).sum(), leaves, retain_graph=True) for x in (loss, expected[0])]
        for grad, exact in zip(*of_loss):
            assert_exact(grad, exact, floor=100 * NOISE)
        compare(torch.cat([loss, lse]), torch.cat(expected[:2]), leaves, noise=10 * NOISE)


@pytest.mark.parametrize("hardness", [0.0, 1.5])
def test_cross_entropy_over_tiles_of_full_size(hardness):
    for plan in (long_plan(300, 513, 127, 3, 128, 1, 150, 129, background=0), self_plan(1100, 1, seed=2),
                 long_plan(*[2] * 600), cross_plan(700, 1300, 2, with_self=True, seed=3)):  # fmt: skip
        anchors, keys = inputs(plan, 3)
        for bound in (None, 100.0):
            scale = torch.tensor(4.0).double().requires_grad_()
            loss, lse, _ = pair_cross_entropy(
                as_rows(anchors), plan.pairs, Scale(scale, bound), keys=as_rows(keys), hardness=hardness
            )
            expected = dense_cross_entropy(anchors, anchors if keys is None else keys, plan, scale, hardness)
            leaves = [x for x in (anchors, keys, scale) if x is not None]
            compare(torch.cat([loss, lse]), torch.cat(expected[:2]), leaves, noise=10 * NOISE)


@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_cross_entropy_of_parts_of_the_keys_merges(hardness):
    """As the docstring says: queues and ranks may hold a part of the keys each."""
    labels, key_labels = integers(4, 30), integers(4, 60, seed=1)
    anchors, keys, scale = rows(30, 5), rows(60, 5, seed=2), torch.tensor(7.0).double()

    def part(chosen):
        pairs, order = partition_against(labels, key_labels[chosen])
        sides = as_rows(anchors[pairs.order.long()]), as_rows(keys[chosen][order.long()])
        return pair_cross_entropy(sides[0], pairs, Scale(scale), keys=sides[1], hardness=hardness)

    whole = part(torch.arange(60))
    # A part without a positive for some anchors, and one without any.
    chosen = [torch.arange(20), torch.arange(20, 60)[key_labels[20:] != 2], torch.arange(20, 60)[key_labels[20:] == 2]]
    losses, lses, masses = (torch.stack(parts) for parts in zip(*map(part, chosen)))
    lse = torch.logsumexp(lses, 0)
    loss = (torch.softmax(masses, 0) * (losses + lse - lses)).sum(0)
    assert_exact(lse, whole[1])
    assert_exact(loss, whole[0])
    assert_exact(torch.logsumexp(masses, 0), whole[2])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1.0, 4.0, -1.0])
def test_tiles_of_full_size(rule, scale):
    """Runs around the sizes at which tiles and masks change."""
    for plan in (long_plan(300, 513, 127, 3, 128, 1, 150, 129, background=0), self_plan(1100, 1, seed=2),
                 cross_plan(900, 1300, 3, with_self=True, seed=3)):  # fmt: skip
        anchors, keys = inputs(plan, 3)
        mask, scale_tensor = allowed(plan, rule), torch.tensor(scale).double().requires_grad_()
        for bound in (None, 100.0):
            actual = pair_lse(as_rows(anchors), plan.pairs, rule, Scale(scale_tensor, bound), keys=as_rows(keys))
            expected = reference.pair_lse(anchors, anchors if keys is None else keys, mask, scale_tensor)
            compare(actual, expected, [x for x in (anchors, keys, scale_tensor) if x is not None])


@pytest.mark.parametrize("bound", [74.9, 75.1, 88.0, 200.0, None])
def test_fast_sum_is_safe_up_to_its_bound(bound):
    """exp(75) of 2000 equal keys does not overflow fp32, exp(88) would; exp(-75) is not lost beside nothing else."""
    scale = torch.tensor(74.9 if bound is None else bound)
    for sign in (1.0, -1.0):
        anchors = torch.zeros(2000, 2)
        anchors[:, 0] = 1.0
        anchors[0] *= sign
        pairs = partition(torch.zeros(2000, dtype=torch.int64))
        lse = pair_lse(as_rows(anchors), pairs, "others", Scale(scale, bound))
        exact = reference.pair_lse(
            anchors.double(), anchors.double(), ~torch.eye(2000, dtype=torch.bool), scale.double()
        )
        torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rule", ["negatives", "others"])
def test_self_at_any_key(rule, schedule):
    """Also where it is the first or the last key of a tile."""
    order = torch.arange(5, dtype=torch.int32)
    start, end = torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    anchors, keys = rows(5, 3), rows(20, 3, seed=1)
    for own in range(20):
        pairs = Pairs(order, Intervals(order * 0 + 3, order * 0 + 6, order * 0 + own, start, end, start, end * 4))
        lse = pair_lse(as_rows(anchors), pairs, rule, Scale(torch.tensor(1.0).double()), keys=as_rows(keys))
        expected = reference.pair_lse(anchors, keys, allowed(Plan(pairs, 20), rule), 1.0)
        assert_exact(lse, expected)


@pytest.mark.parametrize("rule", RULES)
def test_keys_in_parts_are_the_whole(rule, schedule):
    plan = cross_plan(30, 50, 3, seed=2)
    pairs, m = plan
    anchors, keys = inputs(plan)
    scale = Scale(torch.tensor(2.0).double())
    whole = pair_lse(as_rows(anchors), pairs, rule, scale, keys=as_rows(keys))
    mean, mass = pair_mean(as_rows(anchors), pairs, "logit", scale, keys=as_rows(keys), hardness=1.5)
    lses, means, masses = [], [], []
    for first, last in ((0, 17), (17, 18), (18, m)):
        inside = {
            name: (getattr(pairs.intervals, name).clamp(first, last) - first)
            for name in ("pos_start", "pos_end", "key_start", "key_end")
        }
        part = pairs.replace(**inside)
        some = as_rows(keys[first:last])
        lses.append(pair_lse(as_rows(anchors), part, rule, scale, keys=some))
        out, weight = pair_mean(as_rows(anchors), part, "logit", scale, keys=some, hardness=1.5)
        means.append(out)
        masses.append(weight)
    assert_exact(torch.logsumexp(torch.stack(lses), 0).detach(), whole.detach(), floor=NOISE)
    share = torch.softmax(torch.stack(masses), 0).nan_to_num(0.0)  # no positive in any part
    merged = (share * torch.stack(means)).sum(0)
    assert_exact(torch.logsumexp(torch.stack(masses), 0), mass, floor=NOISE)
    compare(merged, mean, [anchors, keys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", ["self", "cross", "paired"])
def test_lower_precision(plan, dtype, schedule):
    """Half-precision rows are read as fp32; sums are fp32."""
    plan = PLANS[plan]()
    leaves = [None if x is None else x.detach().to(dtype) for x in inputs(plan)]
    scale = torch.tensor(3.0)

    def run(primitive, cast):
        x, k = (None if leaf is None else leaf.to(cast).requires_grad_() for leaf in leaves)
        out = primitive(x, k)
        grads = torch.autograd.grad(finite(out).sum(), [leaf for leaf in (x, k) if leaf is not None])
        return out.detach(), grads

    def fast(x, k):
        sides = [None if side is None else Rows(side.detach().to(dtype), side, "blockwise") for side in (x, k)]
        return pair_lse(sides[0], plan.pairs, "others", Scale(scale), keys=sides[1])

    def eager(x, k):
        return reference.pair_lse(x, x if k is None else k, allowed(plan, "others"), scale.to(x.dtype))

    (out, grads), (plain, plain_grads), (exact, exact_grads) = (
        run(fast, torch.float32), run(eager, torch.float32), run(eager, torch.float64)
    )  # fmt: skip
    assert out.dtype == torch.float32
    assert_within_budget(out, plain, exact, "lse")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


def backend_calls(n, dim):
    """Forward and backward of both primitives on the backend itself, self-contrast and cross, without autograd."""
    x, k = rows(n, dim, dtype=torch.float32), rows(n, dim, seed=1, dtype=torch.float32)
    pairs = partition(choice([0, 1, 1, 2], n), background=0)
    cross, _ = partition_against(choice([0, 1], n), choice([0, 1], n))
    scale, grad = torch.tensor(2.0), rows(n, seed=2, dtype=torch.float32)
    for keys, at in ((None, list(pairs.intervals)), (k, list(cross.intervals))):
        for rule in RULES:
            for bound in (None, 50.0):
                yield lambda keys=keys, at=at, rule=rule, bound=bound: (
                    lse := blockwise.pair_lse(x, keys, None, scale, bound, at, rule),
                    *blockwise.pair_lse_backward(grad, lse, x, keys, None, scale, bound, at, rule, True, True, True),
                )
        for stat in (None, grad):
            for hardness, bound in ((0.0, None), (1.0, None), (0.0, 20.0), (1.0, 20.0)):
                yield lambda keys=keys, at=at, stat=stat, hardness=hardness, bound=bound: (
                    *(forward := blockwise.pair_mean(x, keys, stat, None, scale, bound, hardness, 0.0, at)),
                    *blockwise.pair_mean_backward(
                        grad, *forward[:2], x, keys, stat, None, scale, bound, hardness, 0.0, bound is not None, at,
                        True, True, bound is None,
                    ),
                )  # fmt: skip


def test_no_tensor_grows_with_the_square_of_the_rows():
    n, dim = 3000, 8
    for call in backend_calls(n, dim):
        with LargestTensor() as largest:
            call()
        assert n * dim <= largest.numel <= max(tiles.BLOCK**2, 2 * n * dim)


def test_static_schedule_stays_within_its_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "STATIC_BLOCK", 128)
    monkeypatch.setattr(
        tiles, "_schedule",
        lambda at, num_keys, rule, symmetric, _: tiles._static_schedule(at.pos_start.numel(), num_keys, symmetric),
    )  # fmt: skip
    for call in backend_calls(700, 8):
        with LargestTensor() as largest:
            call()
        assert largest.numel <= max(128**2, 2 * 700 * 8)


def test_memory_of_a_whole_step():
    """A map of 12 288 pixels, one region: 600 MB a matrix of pairs, of which nothing may be seen."""
    script = textwrap.dedent("""
        import resource, sys, torch, hpcloss
        torch.set_num_threads(1)
        def step(side):
            x = torch.randn(1, 16, side, 96, requires_grad=True)
            hpcloss.RegionPHPCLoss(None)(x, torch.randint(0, 4, (1, side, 96))).backward()
        step(8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(128)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((after - before) / (1024 if sys.platform != "darwin" else 1024**2))
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 60


def test_results_are_deterministic_to_the_bit():
    for call in backend_calls(700, 8):
        for first, second in zip(call(), call(), strict=True):
            assert torch.equal(first, second)


def test_nothing_is_written_to_the_inputs():
    plan = self_plan()
    anchors, _ = inputs(plan)
    at = list(plan.pairs.intervals)
    arguments = [anchors.detach(), torch.tensor(2.0).double(), rows(40, seed=3), *at]
    before = [tensor.clone() for tensor in arguments]
    x, scale, grad = arguments[:3]
    lse = blockwise.pair_lse(x, None, None, scale, None, at, "others")
    blockwise.pair_lse_backward(grad, lse, x, None, None, scale, None, at, "others", True, True, True)
    out, mass, _ = blockwise.pair_mean(x, None, grad, None, scale, None, 1.0, 0.1, at)
    blockwise.pair_mean_backward(
        grad, out, mass, x, None, grad, None, scale, None, 1.0, 0.1, False, at, True, True, True
    )
    assert all(torch.equal(tensor, old) for tensor, old in zip(arguments, before, strict=True))


def test_unneeded_gradients_are_not_returned():
    plan = cross_plan()
    anchors, keys = (x.detach() for x in inputs(plan))
    at, scale, grad = list(plan.pairs.intervals), torch.tensor(2.0).double(), rows(30, seed=3)
    lse = blockwise.pair_lse(anchors, keys, None, scale, None, at, "every")
    arguments = (grad, lse, anchors, keys, None, scale, None, at, "every")
    both = blockwise.pair_lse_backward(*arguments, True, True, True)
    for needs_anchors, needs_keys in ((True, False), (False, True), (False, False)):
        some = blockwise.pair_lse_backward(*arguments, needs_anchors, needs_keys, False)
        for needed, got, wanted in zip((needs_anchors, needs_keys), some, both, strict=False):
            assert torch.equal(got, wanted) if needed else got.numel() == 0


def test_stat_goes_with_the_term():
    plan = self_plan()
    anchors, _ = inputs(plan)
    scale = Scale(torch.tensor(1.0).double())
    with pytest.raises(ValueError, match="stat must be a tensor with term 'own', got None"):
        pair_mean(as_rows(anchors), plan.pairs, "own", scale)
    with pytest.raises(ValueError, match="stat must be None with term 'logit', got a tensor"):
        pair_mean(as_rows(anchors), plan.pairs, "logit", scale, stat=rows(40))


def test_keys_of_another_backend_are_refused():
    anchors, keys = inputs(PLANS["cross"]())
    sides = as_rows(anchors), as_rows(keys, "triton")
    with pytest.raises(ValueError, match="keys must be packed for backend 'blockwise', as anchors, got 'triton'"):
        pair_lse(sides[0], PLANS["cross"]().pairs, "every", Scale(torch.tensor(1.0).double()), keys=sides[1])


def test_a_scale_and_its_bound():
    rows_of_x = as_rows(rows(3, 4))
    scale = Scale.of(0.25, rows_of_x, normalize=True)
    assert (scale.value.item(), scale.bound, scale.value.dtype) == (4.0, 4.0, torch.float64)
    assert scale.times(-2)[1] == 8.0 and scale.times(-2).value.item() == -8.0
    assert scale.raised(0.5) == (scale.value, 4.5) and scale.unbounded() == (scale.value, None)
    assert Scale.of(0.25, rows_of_x, normalize=False).bound is None
    learnt = torch.nn.Parameter(torch.tensor(0.5))
    assert Scale.of(learnt, rows_of_x, normalize=True).bound is None
    assert Scale.of(learnt, rows_of_x, normalize=True).times(3).value.requires_grad


def test_resolve():
    x = torch.zeros(1, 1)
    assert [resolve(name, x) for name in ("auto", "dense", "blockwise")] == ["pytorch", "dense", "blockwise"]
    with pytest.raises(ValueError, match="backend must be one of .*'eager'"):
        resolve("eager", x)
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call: "):
        resolve("triton", x)
