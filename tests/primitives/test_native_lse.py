"""Log-sum-exps and packed rows of the native library in fp32 against float64, as `test_native_rows`; its threads."""

import pytest
import torch

from hpcloss import reference
from hpcloss.backends.dense import rows as dense_rows
from hpcloss.plan import native
from hpcloss.plan.partition import partition
from hpcloss.primitives.pair_lse import RULES, pair_lse, pair_lse_both
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, rows
from tests.tools.native_rows import (
    DENSE,
    EVERY_PLAN,
    FORMS,
    SCALES,
    fast_contrast,
    losses_and_gradients,
    serves,
    watched,
)
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import PLANS, Plan, allowed, as_rows, finite, inputs

pytestmark = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu"))


@pytest.fixture
def calls(monkeypatch):
    return watched(monkeypatch)


@pytest.fixture
def schedule(request, monkeypatch, calls):
    if request.param == "dense, slopes made again":
        monkeypatch.setattr(dense_rows, "MOST", 40)
    if request.param == "dense, without the library":
        monkeypatch.setattr(native, "serves", lambda tensor: False)
    return "dense"


# ------------------------------------------------------------------------------------------------- log-sum-exps


def lse_and_gradients(call, leaves, value, dtype):
    """One tensor of log-sum-exps, and its gradients; the scale's of several upstream gradients."""
    leaves = [x.detach().float().to(dtype).requires_grad_() for x in leaves]
    scale = torch.tensor(value).to(dtype).requires_grad_()
    lse = call(*leaves, scale)
    upstream = rows(4, *lse.shape, seed=99).float().to(dtype)
    found = [torch.autograd.grad(finite(lse), [*leaves, scale], one, retain_graph=True) for one in upstream]
    return lse.detach(), (*found[0][:-1], torch.stack([grads[-1] for grads in found]))


def assert_lse(fast, plain, leaves, value):
    (lse, grads), *others = [
        lse_and_gradients(call, leaves, value, dtype)
        for call, dtype in ((fast, torch.float32), (plain, torch.float32), (plain, torch.float64))
    ]
    assert lse.dtype == torch.float32
    assert_within_budget(lse, others[0][0], others[1][0], "lse")
    for grad, eager, exact in zip(grads, others[0][1], others[1][1], strict=True):
        assert_within_budget(grad, eager, exact, "grad")


@pytest.mark.parametrize(
    ("schedule", "plan"), [(name, plan) for name in DENSE for plan in EVERY_PLAN], indirect=["schedule"]
)
def test_pair_lse(schedule, plan, calls, request):
    name, plan = request.node.callspec.params["schedule"], EVERY_PLAN[plan]()
    leaves = [x for x in inputs(plan) if x is not None]
    for rule in RULES:
        mask = allowed(plan, rule)

        def fast(x, *rest, rule=rule):
            keys = as_rows(rest[0], schedule) if rest[1:] else None
            return pair_lse(as_rows(x, schedule), plan.pairs, rule, Scale(rest[-1]), keys=keys)

        def plain(x, *rest, mask=mask):
            return reference.pair_lse(x, rest[0] if rest[1:] else x, mask, rest[-1])

        for value in SCALES:
            assert_lse(fast, plain, leaves, value)
    for function in ("lse", "lse_slopes"):
        assert calls[function] >= len(RULES) * len(SCALES) if serves(name, plan) else calls[function] == 0


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        *((plan, "every") for plan in ("one to one", "labelled keys", "keys in any order", "cells", "no keys")),
        *(("equal regions, other keys", rule) for rule in ("every", "negatives")),
        ("one to one", "negatives"),
    ],
)
@pytest.mark.parametrize("schedule", DENSE, indirect=True)
def test_pair_lse_both(schedule, plan, rule, calls, request):
    name, plan = request.node.callspec.params["schedule"], EVERY_PLAN[plan]()
    mask = allowed(plan, rule)

    def fast(x, keys, scale):
        return torch.cat(pair_lse_both(as_rows(x, schedule), as_rows(keys, schedule), plan.pairs, rule, Scale(scale)))

    def plain(x, keys, scale):
        return torch.cat([reference.pair_lse(x, keys, mask, scale), reference.pair_lse(keys, x, mask.T, scale)])

    for value in SCALES:
        assert_lse(fast, plain, inputs(plan), value)
    for function in ("lse", "lse_columns", "lse_both_slopes"):
        assert calls[function] >= len(SCALES) if serves(name, plan) else calls[function] == 0


# --------------------------------------------------------------------------------------------------------- packing


def vectors_of_every_length():
    """Of no length, one that counts as none, one just longer, and ones whose squares fp32 does not hold."""
    x = rows(12, 5, dtype=torch.float32)
    x[0] = 0
    x[1] *= 1e-14
    x[2] = torch.tensor([1.001e-12, 0, 0, 0, 0])
    x[3] = torch.tensor([0.999e-12, 0, 0, 0, 0])
    x[4] *= 1e15
    x[5] *= 1e25
    x[6] *= 1e-9
    return x


# Features [B, D, *S] of 12 pixels, whose memory is dense.
LAYOUTS = {
    "vectors": lambda x: x,
    "channels first": lambda x: x.view(2, 3, 2, 5).movedim(-1, 1).contiguous(),
    "channels last": lambda x: x.view(2, 6, 5).movedim(-1, 1),
}


def by_pixel(x):
    return x.movedim(1, -1).reshape(12, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("live", [12, 9, 0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pack(layout, normalize, live, dtype, calls, monkeypatch):
    """Against the same in float64, and in fp32 without the library; dead pixels hold what they like."""
    x = vectors_of_every_length()
    order = torch.tensor([4, 0, 11, 7, 1, 3, 2, 8, 6, 5, 9, 10], dtype=dtype)
    x[order[live:].long()] = float("nan")
    x[order[-1:].long()] = float("inf") if live < 12 else 1.0
    upstream = rows(12, 5, seed=3, dtype=torch.float32)
    upstream[live:] = 0

    def run(dtype):
        leaf = LAYOUTS[layout](x.to(dtype)).detach().requires_grad_()
        packed = pack(leaf, order, torch.tensor(live), normalize=normalize, permutation=True, backend="dense")
        (grad,) = torch.autograd.grad(packed.companion, leaf, upstream.to(dtype))
        assert grad.stride() == leaf.stride()
        return packed.data, by_pixel(grad)

    found, exact = run(torch.float32), run(torch.float64)
    assert calls["pack"] == calls["unpack"] == 1
    monkeypatch.setattr(native, "serves", lambda tensor: False)
    without = run(torch.float32)
    assert calls["pack"] == calls["unpack"] == 1
    assert (found[0][live:] == 0).all() and (found[1][order[live:].long()] == 0).all()
    for i in range(live):  # one by one, as their gradients differ by 40 orders of magnitude
        pixel = order[i].long()
        assert_within_budget(found[0][i], without[0][i], exact[0][i], "grad")
        assert_within_budget(found[1][pixel], without[1][pixel], exact[1][pixel], "grad")


@pytest.mark.parametrize("change", ["float64", "not dense"])
def test_what_the_library_does_not_pack(change, calls):
    x = rows(12, 5, dtype=torch.float64 if change == "float64" else torch.float32)
    x = torch.stack([x, x], -1)[..., 1] if change == "not dense" else x
    packed = pack(x, torch.arange(12), normalize=True, backend="dense")
    assert calls["pack"] == 0
    torch.testing.assert_close(packed.data, torch.nn.functional.normalize(x))


# ------------------------------------------------------------------------------------------- threads, NaN, infinity


def test_threads_change_no_bit(monkeypatch, calls):
    """Of regions that are cut into several items of work."""
    plan = Plan(partition(choice([0, 1, 1, 2, 255], 700), ignore_index=(255,)), None)
    cross = PLANS["one to one"]()
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = []
        for form in FORMS:
            losses, _, grads = losses_and_gradients(fast_contrast("dense"), plan, form, 3.0, torch.float32)
            found += [losses, *grads]
        order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
        packed = pack(rows(700, 5, dtype=torch.float32), order, normalize=True, backend="dense")
        found.append(packed.data)
        for rule in RULES:
            leaf = rows(700, 5, dtype=torch.float32).requires_grad_()
            lse = pair_lse(as_rows(leaf, "dense"), plan.pairs, rule, Scale(torch.tensor(3.0)))
            found += [lse.detach(), *torch.autograd.grad(finite(lse).sum(), leaf)]
        sides = [x.detach().float().requires_grad_() for x in inputs(cross)]
        both = torch.cat(
            pair_lse_both(*(as_rows(x, "dense") for x in sides), cross.pairs, "every", Scale(torch.tensor(3.0)))
        )
        found += [both.detach(), *torch.autograd.grad(both.sum(), sides)]
        results.append(found)
    for index, (one, two, four) in enumerate(zip(*results, strict=True)):
        assert torch.equal(one, two) and torch.equal(one, four), index
    ran = {"contrast", "add_transpose", "pack", "lse", "lse_slopes", "lse_both_slopes"}
    assert ran <= set(calls), dict(calls)
