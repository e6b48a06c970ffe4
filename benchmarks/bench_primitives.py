"""The two primitives alone, forward and backward apart, against the matmuls of each."""

from __future__ import annotations

from functools import partial

import cases
import pytest
import torch
from measure import Matmuls, against, assert_close

from hpcloss import reference
from hpcloss.plan.partition import Pairs, one_to_one, partition
from hpcloss.primitives.pair_lse import pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale

COUNT, DIM, CLASSES, SCALE = 4096, 128, 4, 10.0
CHECKED = 1024


@pytest.fixture(scope="module")
def matmuls():
    return Matmuls()


def _plan(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Rows, Pairs, torch.Tensor]:
    embeddings, labels = cases.vectors(count, DIM, CLASSES)
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    pairs = partition(labels)
    return embeddings, pack(embeddings, pairs.order, normalize=True, backend="blockwise"), pairs, labels


def _masks(pairs: Pairs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    label = labels[pairs.order]
    same = label[:, None] == label
    itself = torch.eye(label.numel(), dtype=torch.bool)
    return {"positives": same & ~itself, "negatives": ~same, "others": ~itself, "every": torch.ones_like(same)}


def _work(pairs: Pairs, labels: torch.Tensor, rule: str, direction: str) -> float:
    """Half of S in the forward pass; half of S and the gradients of both sides in the backward pass."""
    count = float(_masks(pairs, labels)[rule].sum())
    return 2 * DIM * count * {"forward": 0.5, "backward": 1.5}[direction]


def _check(run, exact) -> None:
    """A primitive on CHECKED rows in fp32: output and gradient against the dense form in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        embeddings, rows, pairs, labels = _plan(CHECKED, dtype)
        if dtype == torch.float32:
            out = run(rows, pairs)
            found.append((out, *torch.autograd.grad(out.mean(), embeddings)))
        else:
            unit = torch.nn.functional.normalize(embeddings, dim=1)[pairs.order]
            out = exact(unit, pairs, _masks(pairs, labels))
            found.append((out, *torch.autograd.grad(out.mean(), embeddings)))
    for what, actual, wanted in zip(("output", "gradient"), *found, strict=True):
        assert_close(what, actual, wanted)


def _time(benchmark, report, matmuls, run, rule: str, direction: str, rows: Rows, pairs: Pairs, labels) -> None:
    out = run(rows, pairs)
    grad = torch.full_like(out, 1 / COUNT)
    work = _work(pairs, labels, rule, direction)
    if direction == "forward":
        with torch.no_grad():
            seconds, ratio = against(benchmark, partial(run, rows, pairs), matmuls, work)
    else:
        step = partial(torch.autograd.grad, out, rows.companion, grad, retain_graph=True)
        seconds, ratio = against(benchmark, step, matmuls, work)
    report(seconds, work_ratio=ratio)


@pytest.mark.benchmark(group="pair_lse")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "online-maximum"])
@pytest.mark.parametrize(
    "rule", ["negatives", "others", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("positives", "every"))]
)
def bench_pair_lse(benchmark, report, matmuls, rule, bounded, direction):
    scale = torch.tensor(SCALE)

    def run(rows, pairs):
        return pair_lse(rows, pairs, rule, Scale(scale, SCALE if bounded else None))

    def exact(unit, pairs, masks):
        return reference.pair_lse(unit, unit, masks[rule], SCALE)

    _check(run, exact)
    _, rows, pairs, labels = _plan(COUNT)
    _time(benchmark, report, matmuls, run, rule, direction, rows, pairs, labels)


@pytest.mark.benchmark(group="pair_mean")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("hardness", [0.0, 1.0], ids=["hardness0", "hardness1"])
def bench_pair_mean_own(benchmark, report, matmuls, hardness, direction):
    """Each positive against its own denominator, over the pairs of one class."""
    scale = torch.tensor(SCALE)

    def stat(pairs):
        return torch.linspace(2.0, 12.0, pairs.order.numel(), dtype=torch.float32)

    def run(rows, pairs):
        return pair_mean(rows, pairs, "own", Scale(scale, SCALE), stat=stat(pairs), hardness=hardness)[0]

    def exact(unit, pairs, masks):
        return reference.pair_mean(unit, unit, masks["positives"], SCALE, hardness, stat(pairs).double(), "own")[0]

    _check(run, exact)
    _, rows, pairs, labels = _plan(COUNT)
    _time(benchmark, report, matmuls, run, "positives", direction, rows, pairs, labels)


@pytest.mark.benchmark(group="pair_mean")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("hardness", [0.0, 1.0], ids=["hardness0", "hardness1"])
def bench_pair_mean_logit(benchmark, report, matmuls, hardness, direction):
    """A linear term: with uniform weights a class sum, so that it takes less than the matmuls of its pairs."""
    scale = torch.tensor(SCALE)

    def run(rows, pairs):
        return pair_mean(rows, pairs, "logit", Scale(scale, SCALE), hardness=hardness)[0]

    def exact(unit, pairs, masks):
        return reference.pair_mean(unit, unit, masks["positives"], SCALE, hardness, None, "logit")[0]

    _check(run, exact)
    _, rows, pairs, labels = _plan(COUNT)
    _time(benchmark, report, matmuls, run, "positives", direction, rows, pairs, labels)


@pytest.mark.benchmark(group="pair_lse")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_pair_lse_both(benchmark, report, matmuls, direction):
    """Rows and columns of one S between two sets of rows: nothing is mirrored, so 2 and 6 products of N x N x D."""
    scale = Scale(torch.tensor(SCALE), SCALE)

    def packed(count, dtype):
        maps = [cases.vectors(count, DIM, CLASSES, seed)[0].detach().to(dtype).requires_grad_() for seed in (0, 1)]
        pairs = one_to_one(count, maps[0].device)
        return maps, [pack(rows, pairs.order, normalize=True, backend="blockwise") for rows in maps], pairs

    found = []
    maps, sides, pairs = packed(CHECKED, torch.float32)
    out = sum(pair_lse_both(*sides, pairs, "every", scale))
    found.append((out, *torch.autograd.grad(out.mean(), maps)))
    maps, _, _ = packed(CHECKED, torch.float64)
    query, key = (torch.nn.functional.normalize(rows, dim=1) for rows in maps)
    logits = SCALE * query @ key.T
    out = logits.logsumexp(1) + logits.logsumexp(0)
    found.append((out, *torch.autograd.grad(out.mean(), maps)))
    for what, actual, wanted in zip(("output", "gradient of rows", "gradient of keys"), *found, strict=True):
        assert_close(what, actual, wanted)

    _, sides, pairs = packed(COUNT, torch.float32)
    out, grads = pair_lse_both(*sides, pairs, "every", scale), [torch.full((COUNT,), 1 / COUNT)] * 2
    if direction == "forward":
        step, work = partial(pair_lse_both, *sides, pairs, "every", scale), 2.0
    else:
        companions = [side.companion for side in sides]
        step, work = partial(torch.autograd.grad, out, companions, grads, retain_graph=True), 6.0
    with torch.set_grad_enabled(direction == "backward"):
        seconds, ratio = against(benchmark, step, matmuls, work * DIM * COUNT**2)
    report(seconds, work_ratio=ratio)
