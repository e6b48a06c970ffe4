"""The losses, forward and backward, against the matmuls that they need and against what they replace."""

from __future__ import annotations

import os
import statistics
import subprocess

import cases
import pytest
import torch
from fresh import measure
from measure import (
    ROUNDS,
    Bar,
    Matmuls,
    against,
    assert_close,
    assert_same_as,
    busy,
    interleaved,
    speed_up,
)
from torch import Tensor

from hpcloss import reference, region_phpc_loss, supcon_loss

ONE_REGION = {"batch": 1, "height": 64, "width": 128}
SIXTEEN_REGIONS = {"batch": 8, "height": 64, "width": 64, "region_size": 16}
FOUR_REGIONS = {"batch": 8, "height": 32, "width": 32, "region_size": 16}


@pytest.fixture(scope="module")
def matmuls():
    return Matmuls()


def slow(*values: object) -> list:
    """Parameters of `make bench` alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# --------------------------------------------------------------------------------------------------- correctness

SAMPLED = 256


def _assert_anchors(
    case: cases.Case, loss: Tensor, rows: Tensor, labels: Tensor, regions: Tensor, hardness: float | None = None
) -> None:
    """Losses [N] of sampled anchors, and their gradient in all rows, against the dense form in float64.

    The whole loss in float64 would take gigabytes at these sizes; 256 anchors against all keys do not. `hardness`:
    that of the pixel contrast, None for supervised contrast of vectors.
    """
    chosen = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(2))[:SAMPLED]
    found = (loss[chosen].mean(), *torch.autograd.grad(loss[chosen].mean(), case.leaves))

    leaf = case.leaves[0].detach().double().requires_grad_()
    unit = torch.nn.functional.normalize(_rows_of(leaf), dim=1)
    key = torch.arange(labels.numel())
    same = labels[chosen, None] == labels
    inside = (regions[chosen, None] == regions) & (chosen[:, None] != key)
    anchors, scale = unit[chosen], 10.0
    if hardness is None:
        lse = reference.pair_lse(anchors, unit, inside, scale)
        exact = lse - reference.pair_mean(anchors, unit, inside & same, scale, 0.0, None, "logit")[0]
    else:
        lse = reference.pair_lse(anchors, unit, inside & ~same, scale)
        exact = reference.pair_mean(anchors, unit, inside & same, scale, hardness, lse, "own")[0]
        exact = torch.where(labels[chosen] > 0, exact, 0.0)
    wanted = (exact.mean(), *torch.autograd.grad(exact.mean(), leaf))
    for what, ours, right in zip(("loss", "gradient"), found, wanted, strict=True):
        assert_close(what, ours, right)


def _rows_of(leaf: Tensor) -> Tensor:
    return leaf if leaf.dim() == 2 else leaf.movedim(1, -1).reshape(-1, leaf.shape[1])


def _assert_region_phpc(case: cases.Case, region_size: int | None, hardness: float) -> None:
    features, labels = case.arguments
    size = region_size or max(labels.shape[1:])
    loss = region_phpc_loss(features, labels, region_size, hardness=hardness, reduction="none").reshape(-1)
    rows, columns = (torch.arange(extent) // size for extent in labels.shape[1:])
    regions = (rows[:, None] * labels.shape[2] + columns).expand_as(labels).reshape(-1)
    _assert_anchors(case, loss, features, labels.reshape(-1), regions, hardness)


# ------------------------------------------------------------------------------------- against the matmuls alone


@pytest.mark.benchmark(group="against matmuls")
def bench_supcon(benchmark, report, matmuls):
    """N = 8192, D = 128: forward and backward over 2F of matmul."""
    case = cases.supcon(8192)
    embeddings, labels = case.arguments
    _assert_anchors(case, supcon_loss(*case.arguments, reduction="none"), embeddings, labels, torch.zeros_like(labels))
    seconds, ratio = against(benchmark, case.step, matmuls, case.work)
    peak = measure("supcon", count=8192)["extra_mb"]
    bars = [Bar("time over 2F of sgemm", ratio, 1.4), Bar("peak extra MB", peak, 32)]
    report(seconds, bars, work_ratio=ratio, peak_mb=peak)


REGION_BARS = {("one", 0.0): 1.6, ("one", 1.0): 1.8, ("sixteen", 0.0): 1.9, ("sixteen", 1.0): 2.1}


@pytest.mark.benchmark(group="against matmuls")
@pytest.mark.parametrize("background", [False, *slow(True)], ids=["all-anchors", "one-background"])
@pytest.mark.parametrize("hardness", [0.0, 1.0], ids=["hardness0", "hardness1"])
@pytest.mark.parametrize("regions", ["one", "sixteen"])
def bench_region_phpc(benchmark, report, matmuls, regions, hardness, background):
    """8192 pixels in one region, or 16 regions of 2048 with sort and gather, four classes.

    With one class of four as background the pairs of two background pixels need nothing; the reference work is exact.
    """
    shape = ONE_REGION if regions == "one" else SIXTEEN_REGIONS
    case = cases.region_phpc(**shape, hardness=hardness, background=background)
    _assert_region_phpc(case, shape.get("region_size"), hardness)
    seconds, ratio = against(benchmark, case.step, matmuls, case.work, rounds=ROUNDS if not background else 3)
    peak = measure("region_phpc", **shape, hardness=hardness, background=background)["extra_mb"]
    bars = [Bar("time over the matmuls", ratio, REGION_BARS[regions, hardness])]
    report(seconds, bars, work_ratio=ratio, peak_mb=peak)


@pytest.mark.benchmark(group="two threads")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("what", ["supcon", *slow("one-region", "sixteen-regions")])
def bench_two_threads(benchmark, report, what):
    """Speed-up of two threads over one, as a share of that of one large matmul in the same rounds."""
    if what == "supcon":
        case = cases.supcon(8192)
    else:
        case = cases.region_phpc(**(ONE_REGION if what == "one-region" else SIXTEEN_REGIONS))
    load = busy()
    seconds, ours, sgemm = speed_up(benchmark, case.step, rounds=1 if load else ROUNDS)
    bars = [Bar("share of two-thread sgemm's speed-up", ours / sgemm, 0.8, at_least=True)]
    note = f"no free second core, load {load:.1f}: the figures say nothing" if load else None
    report(seconds, bars, speed_up=ours, sgemm_speed_up=sgemm, note=note)


@pytest.mark.benchmark(group="large")
@pytest.mark.slow
@pytest.mark.parametrize("hardness", [1.0])
def bench_whole_map(benchmark, report, hardness):
    """A 256 x 256 map, every pixel against every other, no regions and no samples: one run, in its own process."""
    threads = 1 if busy() else min(2, os.cpu_count() or 1)
    shape = {"batch": 1, "height": 256, "width": 256, "hardness": hardness, "threads": threads, "timeout": 300}
    try:
        found = benchmark.pedantic(measure, args=("region_phpc",), kwargs=shape, rounds=1, iterations=1)
    except subprocess.TimeoutExpired:  # a busy machine is no error of the loss
        report(None, note=f"not finished in {shape['timeout']} s, load {busy() or 0:.1f}")
        return
    bars = [Bar("peak extra MB", found["extra_mb"], 300)]
    dense = 4 * 65536**2 / 2**30
    report(found["seconds"], bars, peak_mb=found["extra_mb"], run_threads=threads, one_dense_matrix_gb=dense)


# ------------------------------------------------------------------------------------- against what they replace


@pytest.mark.benchmark(group="block loop")
@pytest.mark.parametrize("form", ["as-meant", *slow("as-committed")])
def bench_published_block_loop(benchmark, report, form):
    """Four blocks of 2048 pixels: the published loop over dense blocks, against this package on the same input.

    As meant: the same loss, checked. As committed: four padded quadrants a block, a value of its own.
    """
    ours = cases.published_phpc(**FOUR_REGIONS) if form == "as-meant" else cases.region_phpc(**FOUR_REGIONS)
    name = "block_loop" if form == "as-meant" else "committed_block_loop"
    loop = cases.CASES[name](**FOUR_REGIONS)
    if form == "as-meant":
        assert_close("loss", ours.step(), loop.step())
        assert_close("gradient", ours.leaves[0].grad, loop.leaves[0].grad)
    else:
        assert torch.isfinite(loop.step())
    seconds, faster = interleaved(benchmark, ours.step, loop.step, rounds=3)
    case = "published_phpc" if form == "as-meant" else "region_phpc"
    peak = measure(case, **FOUR_REGIONS)["extra_mb"]
    # What the loop frees comes back to the system early in some processes and late in most.
    loop_peak = statistics.median(measure(name, **FOUR_REGIONS)["extra_mb"] for _ in range(3))
    sixteen = measure(case, **SIXTEEN_REGIONS)["extra_mb"]
    bars = [
        Bar("times faster than the block loop", faster, 8, at_least=True),
        Bar("times less memory than the block loop", loop_peak / peak, 20, at_least=True),
    ]
    report(
        seconds, bars, peak_mb=peak, loop_seconds=seconds * faster, loop_peak_mb=loop_peak,
        sixteen_regions_peak_mb=sixteen, sixteen_regions_loop_needs_mb=4 * loop_peak,
    )  # fmt: skip


@pytest.mark.benchmark(group="dense PHPC")
@pytest.mark.parametrize("side", [*slow(32), 64])
def bench_dense_phpc(benchmark, report, side):
    """One region, hardness 1: this package against the dense loss in eager mode."""
    shape = {"batch": 1, "height": side, "width": side}
    ours, eager = cases.region_phpc(**shape), cases.eager_phpc(**shape)
    assert_same_as(ours)
    assert_close("eager loss", eager.step(), ours.step())
    seconds, faster = interleaved(benchmark, ours.step, eager.step, rounds=3)
    peak, eager_peak = measure("region_phpc", **shape)["extra_mb"], measure("eager_phpc", **shape)["extra_mb"]
    report(seconds, eager_over_ours=faster, peak_mb=peak, eager_peak_mb=eager_peak)
