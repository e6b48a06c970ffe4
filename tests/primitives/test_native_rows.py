"""Small problems and contrasts in pieces in the native library, in fp32: against plain PyTorch in float64.

The budget is twice the error of plain PyTorch in fp32 and a few ulps. Each test says which of the library's functions
must have run, as a fallback would give the same numbers.
"""

import functools
import math

import pytest
import torch

from hpcloss import functional, reference
from hpcloss.backends import dense as dense_package
from hpcloss.backends import pieces, pytorch
from hpcloss.backends.dense import rows as dense_rows
from hpcloss.operators import ops
from hpcloss.plan import native
from hpcloss.plan.partition import partition_against
from tests.tools.cases import choice, integers, rows
from tests.tools.native_rows import (
    DENSE,
    EVERY_PLAN,
    FORMS,
    PAIR,
    PAIRED,
    SCALES,
    fast_contrast,
    losses_and_gradients,
    plain_contrast,
    serves,
    watched,
)
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import OF_KEYS, PLANS, LargestTensor, allowed, inputs

pytestmark = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu"))

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
        monkeypatch.setitem(pytorch.DENSE_UP_TO, "contrast", 0)
        monkeypatch.setattr(pieces, "MOST", 40 if request.param == "pieces of few rows" else pieces.MOST)
        return "pytorch"
    return "dense"


@functools.cache
def expected(plan, form, value, same_upstream):
    """Of plain PyTorch, in fp32 and in float64."""
    arguments = EVERY_PLAN[plan](), dict(form), value
    return [losses_and_gradients(plain_contrast, *arguments, x, same_upstream) for x in (torch.float32, torch.float64)]


def assert_contrast(plan, form, backend, value, same_upstream=False):
    found = losses_and_gradients(fast_contrast(backend), EVERY_PLAN[plan](), form, value, torch.float32, same_upstream)
    eager, exact = expected(plan, tuple(form.items()), value, same_upstream)
    assert found[0].dtype == torch.float32 and torch.equal(found[1], exact[1])
    assert_within_budget(found[0], eager[0], exact[0], "loss")
    for grad, plain, right in zip(found[2], eager[2], exact[2], strict=True):
        assert_within_budget(grad, plain, right, "grad")


# ------------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [(name, plan) for name in DENSE for plan in EVERY_PLAN] + [(name, plan) for name in PIECES for plan in OF_KEYS],
    indirect=["schedule"],
)
def test_contrast(schedule, plan, calls, request):
    forms = FORMS + [PAIR] * (plan in PAIRED)
    for form in forms:
        for value in SCALES:
            assert_contrast(plan, form, schedule, value)
    name = request.node.callspec.params["schedule"]
    at_least = len(forms) * len(SCALES) * (1 if name == "dense" else 2)  # the second time in backward
    assert calls["contrast"] >= at_least if serves(name, EVERY_PLAN[plan]()) else calls["contrast"] == 0


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [("dense", "self"), ("pieces", "cross"), ("pieces of few rows", "cells"), ("pieces of few rows", "one to one")],
    indirect=["schedule"],
)
def test_one_weight_for_all_losses(schedule, plan, calls):
    """As of a sum or a mean: pieces multiply the gradients that they have, and compute nothing a second time."""
    for form in FORMS + [PAIR] * (plan in PAIRED):
        before = calls["contrast"]
        losses_and_gradients(fast_contrast(schedule), EVERY_PLAN[plan](), form, 3.0, torch.float32, same_upstream=True)
        forward = calls["contrast"] - before
        assert_contrast(plan, form, schedule, 3.0, same_upstream=True)
        assert calls["contrast"] == before + 2 * forward
    assert forward > 0


@pytest.mark.parametrize("form", [*FORMS, PAIR], ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("plan", ["many short runs", "one to one", "equal regions"])
def test_slopes_made_again_are_those_that_were_kept(plan, form, monkeypatch):
    if form == PAIR and plan not in PAIRED:
        plan = "paired"
    arguments = fast_contrast("dense"), EVERY_PLAN[plan](), form, 3.0, torch.float32
    kept = losses_and_gradients(*arguments)
    monkeypatch.setattr(pytorch, "kept_slopes", lambda at, num_keys: 0)
    again = losses_and_gradients(*arguments)
    for one, other in zip([kept[0], *kept[2]], [again[0], *again[2]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [("dense", "self"), ("dense, slopes made again", "self"), ("dense", "cross"), ("pieces", "cross")],
    indirect=["schedule"],
)
def test_backward_twice(schedule, plan, calls):
    plan = EVERY_PLAN[plan]()
    leaves = [x.detach().float().requires_grad_() for x in inputs(plan) if x is not None]
    scale = torch.tensor(3.0, requires_grad=True)
    losses, _ = fast_contrast(schedule)(*leaves, *[None] * (2 - len(leaves)), plan, scale, denominator="own")
    for upstream in (torch.ones_like(losses), rows(*losses.shape, seed=5, dtype=torch.float32)):
        first, second = (torch.autograd.grad(losses, [*leaves, scale], upstream, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first, second, strict=True))
    assert calls["contrast"] > 0


@pytest.mark.parametrize(("schedule", "plan"), [("dense", "cross"), ("pieces", "cross")], indirect=["schedule"])
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed_is_computed(schedule, plan, needed, calls):
    """Slopes, and the numbers that the scale's gradient is a sum of: for what asks for a gradient, and with one."""
    plan = EVERY_PLAN[plan]()
    leaves = [*(x.detach().float() for x in inputs(plan)), torch.tensor(3.0)]
    every = [x.clone().requires_grad_() for x in leaves]
    right = fast_contrast(schedule)(*every[:2], plan, every[2], denominator="all")
    exact = torch.autograd.grad(right[0].sum(), every)
    calls.arguments["contrast"].clear()
    given = [x.clone().requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
    losses, counted = fast_contrast(schedule)(*given[:2], plan, given[2], denominator="all")
    assert torch.equal(losses, right[0]) and torch.equal(counted, right[1])
    for arguments in calls.arguments["contrast"]:
        needs_slopes, by_scale = arguments[6], arguments[9]
        assert bool(needs_slopes) == any(needed) and (by_scale is not None) == needed[2]
    assert calls.arguments["contrast"] and losses.requires_grad == any(needed)
    for x, need, grad in zip(given, needed, exact, strict=True):
        if need:
            torch.testing.assert_close(*torch.autograd.grad(losses.sum(), x, retain_graph=True), grad)
    calls.arguments["contrast"].clear()
    with torch.no_grad():
        fast_contrast(schedule)(*[x.requires_grad_() for x in leaves[:2]], plan, leaves[2], denominator="all")
    assert all(not arguments[6] and arguments[9] is None for arguments in calls.arguments["contrast"])


@pytest.mark.parametrize("backend", ["dense", "pieces"])
def test_nothing_is_kept_without_a_gradient(backend, monkeypatch):
    plan = PLANS["cross"]()
    anchors, keys = (x.detach().float() for x in inputs(plan))
    arguments = anchors, keys, torch.tensor(3.0), "all", 0.0, 0.0, True, 1, list(plan.pairs.intervals)
    loss, counted, kept, by_scale = ops.pair_contrast(*arguments, False, False, False, 0, backend)
    assert kept.numel() == by_scale.numel() == 0 and counted.any()
    found = ops.pair_contrast_backward(torch.ones_like(loss), kept, by_scale, *arguments, False, False, False, backend)
    assert [x.numel() for x in found] == [0, 0, 1]
    sizes = {(True, False): anchors.numel(), (False, True): keys.numel(), (True, True): anchors.numel() + keys.numel()}
    if backend == "pieces":
        for needs, size in sizes.items():
            kept = ops.pair_contrast(*arguments, *needs, True, size, backend)[2]
            found = ops.pair_contrast_backward(loss, kept, loss, *arguments, *needs, True, backend)
            assert [x.numel() for x in found[:2]] == [x.numel() * need for x, need in zip((anchors, keys), needs)]


def test_keys_without_a_gradient(monkeypatch):
    """In pieces, as a queue or the other view of a momentum encoder."""
    monkeypatch.setitem(pytorch.DENSE_UP_TO, "contrast", 0)
    x, keys = rows(30, 6, dtype=torch.float32), rows(50, 6, seed=1, dtype=torch.float32)
    y, key_labels = integers(4, 30), integers(4, 50, seed=1)
    grads = []
    for of_keys in (True, False):
        leaf = x.clone().requires_grad_()
        loss = functional.supcon_loss(leaf, y, keys.clone().requires_grad_(of_keys), key_labels, reduction="none")
        (grad,) = torch.autograd.grad(loss, leaf, rows(30, seed=3, dtype=torch.float32))
        grads.append(grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("reduction", ["none", "class", "mean"])
@pytest.mark.parametrize("most", [64, pieces.MOST])
def test_losses_in_pieces_with_weights_that_differ(reduction, most, monkeypatch, calls):
    """Of a class with few rows each loss weighs more. Against the reference in float64."""
    monkeypatch.setitem(pytorch.DENSE_UP_TO, "contrast", 0)
    monkeypatch.setattr(pieces, "MOST", most)
    y, key_labels = choice([0, 0, 0, 1, 2, 2, 255], 40), choice([0, 1, 2, 3, 255], 30)
    found = []
    for loss, dtype in (
        (functional.supcon_loss, torch.float32), (reference.supcon_loss, torch.float32),
        (reference.supcon_loss, torch.float64),
    ):  # fmt: skip
        leaves = [rows(n, 6, seed=n).float().to(dtype).requires_grad_() for n in (40, 30)]
        value = loss(leaves[0], y, leaves[1], key_labels, 0.2, reduction=reduction)
        upstream = rows(value.numel(), seed=8).float().to(dtype).view(value.shape)
        found.append((value.detach(), torch.autograd.grad(value, leaves, upstream)))
    assert calls["contrast"] == (1 if reduction == "mean" and most > 64 else calls["contrast"]) > 0
    (value, grads), (plain, plain_grads), (exact, exact_grads) = found
    assert_within_budget(value, plain, exact, "loss")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


# ------------------------------------------------------------------------------------------------- what they hold


def test_pieces_hold_four_megabytes(calls):
    """Of 6 million similarities, and in forward and backward."""
    n, m, dim = 3000, 2000, 4
    pairs, order = partition_against(integers(7, n), integers(7, m, seed=1))
    x, keys = rows(n, dim, dtype=torch.float32)[pairs.order.long()], rows(m, dim, dtype=torch.float32)[order.long()]
    arguments = x, keys, torch.tensor(2.0), "own", 0.0, 0.0, True, 1, list(pairs.intervals)
    grad = rows(n, dtype=torch.float32)
    with LargestTensor() as largest:
        loss, _, kept, by_scale = pieces.pair_contrast(*arguments, True, True, True, (n + m) * dim)
        pieces.pair_contrast_backward(grad, kept, by_scale, *arguments, True, True, True)
    assert n * dim < largest.numel <= pieces.MOST
    held = [call[0] for call in calls.arguments["contrast"]]
    assert sum(piece.numel() for piece in held) == 2 * n * m  # backward too, as the weights differ
    assert max(piece.untyped_storage().nbytes() for piece in held) <= 4 * pieces.MOST == 4 << 20
    assert len({piece.untyped_storage().data_ptr() for piece in held}) == 2  # one buffer each way


@pytest.mark.parametrize("dim", [1, 300])
def test_a_row_of_more_keys_than_a_piece_holds(dim, monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 10)
    pairs, order = partition_against(integers(2, 7), integers(2, 33, seed=1))
    x, keys = rows(7, dim, dtype=torch.float32), rows(33, dim, seed=1, dtype=torch.float32)
    form = "all", 0.0, 0.0, True, 1, list(pairs.intervals)
    found = [
        backend.pair_contrast(x, keys, torch.tensor(0.5), *form, *needs)
        for backend, needs in ((pieces, (True, True, False, 40 * dim)), (dense_package, (False, False, False, 0)))
    ]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][1], found[1][1])


# ----------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("schedule", "plan"), [(name, plan) for name in ("dense", "dense, slopes made again") for plan in
                           ("many short runs", "self", "labelled keys", "keys in any order", "equal regions")]
    + [(name, "keys in any order") for name in PIECES], indirect=["schedule"],
)  # fmt: skip
def test_a_bad_row_reaches_only_its_pairs(schedule, plan, value, calls):
    """Losses and gradients of other regions are the same to the last bit, those of its own are not finite."""
    made = EVERY_PLAN[plan]()
    at = made.pairs.intervals
    has_pairs = (at.pos_end > at.pos_start).tolist()
    region = next(
        r
        for r in range(len(at.key_end))
        if at.key_end[r] - at.key_start[r] > 2 and any(has_pairs[int(at.anchor_start[r]) : int(at.anchor_end[r])])
    )
    mask = allowed(made, "others")
    leaves = [x.detach().float() for x in inputs(made) if x is not None]
    for form in FORMS:
        for bad in [0, 1] if len(leaves) == 2 else [0]:
            key = int((at.anchor_start if len(leaves) == 2 and bad == 0 else at.key_start)[region])
            found = []
            for poisoned in (False, True):
                given = [x.clone() for x in leaves]
                if poisoned:
                    given[bad][key, 1] = value
                given = [x.requires_grad_() for x in given]
                losses, counted = fast_contrast(schedule)(
                    *given, *[None] * (2 - len(given)), made, torch.tensor(3.0), **form
                )
                grads = torch.autograd.grad(losses.sum(), given)
                found.append((losses.detach(), counted, grads))
            (before, counted, grads), (after, same, poisoned_grads) = found
            met = mask[:, key].clone() if bad or len(leaves) == 1 else torch.zeros_like(counted)
            if bad == 0:
                met[key] = True  # the anchor itself
            if math.isnan(value):  # of an infinite row some logits are -inf, and add nothing
                assert not after[met & counted].isfinite().any()
            assert torch.equal(counted, same) and torch.equal(before[~met], after[~met])
            if len(leaves) == 1:
                apart = torch.ones(len(before), dtype=torch.bool)
                apart[int(at.key_start[region]) : int(at.key_end[region])] = False
                assert torch.equal(grads[0][apart], poisoned_grads[0][apart])
            assert before.isfinite().all() and met.any()
    assert calls["contrast"] > 0
