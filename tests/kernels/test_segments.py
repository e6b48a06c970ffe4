"""The Triton kernels that sum intervals of rows: the linear mean in closed form, means of segments, prototypes.

All of them compute in fp32 whatever the rows' dtype, so the plain computation that sets their budget is in fp32.
"""

import math

import pytest
import torch

from hpcloss.operators import load
from hpcloss.plan.partition import Intervals, Pairs, partition
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale
from hpcloss.primitives.segment_mean import segment_mean
from tests.primitives.test_segments import OFFSETS, plain
from tests.tools.cases import choice, rows, runs
from tests.tools.kernels import DEVICE, needs_kernels
from tests.tools.linear_means import SIZED, check_linear, dense, linear, on_device
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import PLANS, as_rows

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # a GPU says nothing of inf - inf
]
HALF_AND_FULL = [torch.float32, torch.float16]
SELF_CONTRAST = [name for name, plan in PLANS.items() if plan().num_keys is None]


@pytest.mark.parametrize("name", SELF_CONTRAST)
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_linear_mean_of_plans(name, dtype, blocks):
    pairs = PLANS[name]().pairs
    check_linear(rows(pairs.order.numel(), 7, dtype=dtype), pairs)


def test_rows_out_of_reach_may_hold_anything(blocks):
    """Dead rows, and those of other classes, add nothing: not even where a tile of rows or a block sum holds them."""
    pairs = partition(torch.cat([runs(20, 30, 21, 3), torch.full((6,), 255)]), ignore_index=(255,))
    upstream = rows(80, seed=99, dtype=torch.float32)
    x = rows(80, 5, dtype=torch.float32)
    clean = linear(x, pairs, 2.0, upstream)
    x[50:71], x[74:] = math.inf, math.nan
    upstream[74:] = math.nan
    broken = linear(x, pairs, 2.0, upstream)
    for before, after in zip(clean[:3], broken[:3], strict=True):
        assert torch.equal(before[:50], after[:50]) and torch.equal(before[71:], after[71:])
    assert not broken[2][50:71].isfinite().any()


def test_dead_rows_have_no_gradient(blocks):
    """Whatever intervals they hold, as those of a paired plan with ignored rows do."""
    pairs = partition(torch.tensor([0] * 20 + [255] * 20), ignore_index=(255,))
    for first, last in ((0, 20), (3, 4)):
        start, end = (
            torch.where(torch.arange(40) < 20, bound, other).int() for bound, other in ((0, first), (20, last))
        )
        out, mass, grad, _ = linear(rows(40, 5), pairs.replace(pos_start=start, pos_end=end), 2.0, rows(40, seed=1))
        assert out[:20].all() and grad[:20].all()
        assert not out[20:].any() and not grad[20:].any() and (mass[20:] == -math.inf).all()


def test_rows_of_any_length(blocks):
    """A sum may hide neither a short row behind a long one, where few share it, nor lose it among many."""
    x = rows(40, 6, dtype=torch.float32)
    x[::2] *= 1e6
    pairs = partition(torch.arange(40) // 2)
    upstream = rows(40, seed=99, dtype=torch.float32)
    actual, exact = linear(x, pairs, 2.0, upstream)[2], dense(x, pairs, 2.0, upstream, torch.float64)[2]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_only_what_is_wanted():
    kernels, pairs = load("triton.linear_mean"), on_device(partition(runs(9, 20)))
    x, scale = rows(29, 5, dtype=torch.float32).to(DEVICE), torch.tensor(2.0, device=DEVICE)
    at, upstream = list(pairs.intervals), rows(29, seed=1, dtype=torch.float32).to(DEVICE)
    out, mass, slope = kernels.linear_mean(x, scale, at)
    assert torch.equal(slope, torch.zeros_like(slope))
    both = kernels.linear_mean_backward(upstream, out, mass, x, scale, at, True, True)
    for wanted in ((True, False), (False, True), (False, False)):
        gradient, none, d_scale = kernels.linear_mean_backward(upstream, out, mass, x, scale, at, *wanted)
        assert torch.equal(gradient, both[0] if wanted[0] else torch.empty(0, device=DEVICE)) and none.numel() == 0
        assert torch.equal(d_scale, both[2] if wanted[1] else torch.zeros((), device=DEVICE))


@pytest.mark.parametrize("options", [{"hardness": 0.5}, {"log_weight": True}, {"keys": True}, {"stat": True}])
def test_other_means_keep_their_pairs(options, monkeypatch):
    """The closed form is for the linear term with uniform weights in self-contrast alone."""
    monkeypatch.setattr(load("triton.pair_mean"), "linear_mean", None)
    x = rows(12, 4, dtype=torch.float32).to(DEVICE)
    pairs, scale = on_device(partition(runs(5, 7))), Scale(torch.tensor(2.0, device=DEVICE))
    given = {
        "log_weight": torch.zeros(12, device=DEVICE),
        "keys": as_rows(x, "triton"),
        "stat": torch.zeros(12, device=DEVICE),
    }
    options = {name: given.get(name, value) for name, value in options.items()}
    pair_mean(as_rows(x, "triton"), pairs, "own" if "stat" in options else "logit", scale, **options)
    with pytest.raises(TypeError):
        pair_mean(as_rows(x, "triton"), pairs, "logit", scale)


# ---------------------------------------------------------------------------------------------------- segment_mean


LONG = {
    "long": [0, 257, 600],
    "all": [0, 600],
    "many": list(range(20, 100, 2)),
    "all sorts": [3, 3, 4, 12, 13, 140, 141, 141, 160, 430, 590],
    "at edges": [8, 16, 64, 128, 192, 512, 576],
}


@pytest.mark.parametrize("name", OFFSETS | LONG)
@pytest.mark.parametrize("dtype,index", [(torch.float32, torch.int32), (torch.float16, torch.int64)])
def test_segment_mean(name, dtype, index, blocks):
    offsets = torch.tensor((OFFSETS | LONG)[name], dtype=index)
    for dim in (1, 100) if dtype == torch.float32 else (7,):
        x = rows(600 if name in LONG else 12, dim, dtype=dtype)
        companion = x.to(DEVICE, torch.float32).requires_grad_()
        actual = segment_mean(Rows(x.to(DEVICE), companion, "triton"), offsets.to(DEVICE))
        upstream = rows(*actual.shape, seed=3, dtype=torch.float32)
        (grad,) = torch.autograd.grad(actual, companion, upstream.to(DEVICE))
        results = []
        for precision in (torch.float32, torch.float64):
            leaf = x.to(precision).requires_grad_()
            means = plain(leaf, offsets)
            results.append((means, *torch.autograd.grad(means, leaf, upstream.to(precision))))
        assert actual.dtype == grad.dtype == torch.float32
        for got, near, exact, kind in zip((actual, grad), *results, ("loss", "grad"), strict=True):
            assert_within_budget(got, near, exact, kind)


def test_segment_mean_of_no_rows():
    none = torch.zeros(0, 5, device=DEVICE)
    means = segment_mean(as_rows(none, "triton"), torch.zeros(3, device=DEVICE).int())
    assert torch.equal(means.cpu(), torch.zeros(2, 5))


def test_rows_outside_segments_reach_nothing(blocks):
    x = rows(600, 5, dtype=torch.float32)
    offsets = torch.tensor([10, 200, 590])
    x[:10], x[590:] = math.nan, math.inf
    means = segment_mean(as_rows(x.to(DEVICE), "triton"), offsets.to(DEVICE))
    torch.testing.assert_close(means.cpu(), plain(x, offsets), rtol=1e-4, atol=1e-6)


def test_deterministic_to_the_bit(blocks):
    x, pairs = rows(200, 7, dtype=torch.float32), SIZED["mixed"](200)
    offsets = torch.tensor([0, 1, 150, 190], device=DEVICE)
    results = [
        (*linear(x, pairs, 3.0, rows(200, seed=1)), segment_mean(as_rows(x.to(DEVICE), "triton"), offsets))
        for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", ["pair_mean", "segment_mean"])
def test_opcheck(op):
    x, pairs = rows(29, 5, dtype=torch.float32).to(DEVICE), on_device(partition(runs(9, 20)))
    scale, at = torch.tensor(2.0, device=DEVICE), list(pairs.intervals)
    calls = {
        "pair_mean": (x, None, None, None, scale, None, 0.0, 0.0, at, "triton"),
        "segment_mean": (x, torch.tensor([0, 9, 29], device=DEVICE), "triton"),
    }
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.hpcloss, op).default, calls[op], test_utils=tests)
    if op == "pair_mean":
        out, mass, _ = torch.ops.hpcloss.pair_mean(*calls[op])
        args = (out, out, mass, x, None, None, None, scale, None, 0.0, 0.0, True, at, True, False, True, "triton")
        torch.library.opcheck(torch.ops.hpcloss.pair_mean_backward.default, args, test_utils=tests)


# ------------------------------------------------------------------------------------------------------ prototypes


def prototype_loss(features, labels, backend):
    """-log softmax of each pixel's similarity to the prototype of its class, the mean of the class's unit rows."""
    pairs = partition(labels, ignore_index=(255,), num_classes=6)
    live = pairs.live()
    anchors = pack(features, pairs.order, live, normalize=True, permutation=True, backend=backend)
    # Ignored pixels sort last.
    ranked = torch.where(labels.reshape(-1) == 255, 6, labels.reshape(-1))[pairs.order.long()]
    offsets = torch.searchsorted(ranked, torch.arange(7, device=ranked.device)).int()
    means = segment_mean(anchors, offsets)
    order = torch.arange(6, dtype=torch.int32, device=ranked.device)
    prototypes = pack(means, order, normalize=True, permutation=True, backend=backend)
    prototypes = Rows(prototypes.data.to(anchors.data.dtype), prototypes.companion, backend)
    own = ranked.clamp(max=5).int()
    ends = torch.zeros(1, dtype=torch.int32, device=own.device), torch.full_like(live, 6)
    bounds = (own, own + 1, torch.full_like(own, -1), pairs.intervals.anchor_start[:1], live, *ends)
    to_keys = Pairs(pairs.order, Intervals(*bounds))
    scale = Scale(torch.tensor(10.0, device=own.device), 10.0)
    lse = pair_lse(anchors, to_keys, "every", scale, keys=prototypes)
    pull, _ = pair_mean(anchors, to_keys, "logit", scale, keys=prototypes)
    counted = torch.arange(own.numel(), device=own.device) < live
    return torch.where(counted, lse - pull, 0.0).sum() / live


def dense_prototype_loss(features, labels):
    x = features.flatten(2).transpose(1, 2).reshape(-1, features.shape[1])
    labels, alive = labels.reshape(-1), labels.reshape(-1) != 255
    x = torch.nn.functional.normalize(x, dim=1)
    means = torch.stack([x[labels == c].sum(0) / (labels == c).sum().clamp(min=1) for c in range(6)])
    norm = means.norm(dim=1, keepdim=True)
    prototypes = means / torch.where(norm > 0, norm, 1.0)
    logits = 10 * x[alive] @ prototypes.T
    return torch.nn.functional.cross_entropy(logits, labels[alive])


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_prototypes(dtype, blocks):
    """Class 3 has no pixel: its prototype is the zero row, and a key like any other."""
    labels = choice([0, 1, 1, 2, 4, 5, 255], 2, 9, 8, seed=2)
    features = rows(2, 7, 9, 8, dtype=dtype)
    results = []
    for precision in (dtype, torch.float64):
        leaf = features.to(precision).requires_grad_()
        loss = dense_prototype_loss(leaf, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    leaf = features.to(DEVICE).requires_grad_()
    loss = prototype_loss(leaf, labels.to(DEVICE), "triton")
    grad = torch.autograd.grad(loss, leaf)
    for actual, near, exact, kind in zip((loss.detach().squeeze(), *grad), *results, ("loss", "grad"), strict=True):
        assert_within_budget(actual, near, exact, kind)
