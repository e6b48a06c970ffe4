"""Competitors on the same rows, next to our rows of the same size."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu import PREPARE
from benchmarks.gpu.cases import HALF, D, infonce, region_phpc, supcon
from benchmarks.gpu.check import distance, expect
from benchmarks.gpu.known import Known, barred
from benchmarks.gpu.machine import DEVICE, KIND, ON_GPU, Skip
from benchmarks.gpu.timing import step_figures
from benchmarks.measure import Bar


def peer_row(run: Known, method: str, n: int) -> dict[str, Any]:
    """A competitor on the same rows, in half precision by autocast, next to our row of the same n."""
    if KIND == PREPARE:
        raise Skip("a competitor has no kernels of ours")
    chunked = method == "linear_cross_entropy"
    case, half = (infonce if chunked else supcon)(n), partial(torch.autocast, DEVICE.type, HALF)
    arguments, loss = (*case.leaves, case.labels)[:2], peers.eager_supcon
    if chunked:
        if reason := peers.why_not("linear_cross_entropy"):
            raise Skip(reason)
        loss, half = peers.chunked_infonce, contextlib.nullcontext
        if not ON_GPU:  # not in half precision on a CPU
            arguments = tuple(leaf.detach().float().requires_grad_() for leaf in case.leaves)
            case = case._replace(leaves=list(arguments))
    elif method == "compiled":
        if not ON_GPU:
            raise Skip("nothing is compiled for a CPU")
        torch._dynamo.reset()
        with half():
            loss = peers.compiled(loss, *arguments)

    def step() -> Tensor:
        with half():
            return loss(*arguments)

    figures = {"n": n, "dim": D, "dtype": "float16", "error_value": distance(step().double(), case.step().double())}
    expect(figures["error_value"] <= 0.05, f"its value is off ours by {figures['error_value']:.2e}")
    figures |= step_figures(step, case.leaves, run.seconds)
    if not (ours := run.figure(f"{'infonce' if chunked else 'supcon'} {n}", "ms")):
        return figures
    figures["times_ours"] = figures["ms"] / ours
    limit = {"eager": 8 if n >= 16384 else None, "compiled": 1 if n >= 2048 else None}.get(method)
    return barred(figures, *([Bar(f"times ours ({method})", figures["times_ours"], limit, True)] if limit else []))


def block_loop_row(run: Known, batch: int, height: int, width: int, region: int) -> dict[str, Any]:
    """The published loop over blocks, fp32 as its authors ran it, beside this package on the map in half precision."""
    options = {"hardness": 0.0, "discount": 0.1, "reduction": "region"}
    case = region_phpc(batch, height, width, region, 0.2, **options)
    leaf = case.leaves[0].detach().float().requires_grad_()

    def loop() -> Tensor:
        if KIND == PREPARE:  # minutes on a CPU, and no kernel of ours
            return (leaf * 0).sum()
        with DEVICE:
            return peers.block_loop(leaf, case.labels, region)

    figures = {"n": case.labels.numel(), "dim": D, "dtype": "float16"}
    figures["error_value"] = distance(case.step(), loop().double())
    expect(figures["error_value"] <= 1e-2, f"the loop's value is off ours by {figures['error_value']:.2e}")
    figures |= step_figures(case.step, case.leaves, run.seconds)
    figures |= {f"loop_{key}": value for key, value in step_figures(loop, [leaf], run.seconds).items()}
    single = step_figures(lambda: case.loss(leaf), [leaf], run.seconds)["ms"]
    figures |= {"fp32_ms": single, "fp32_times_faster": figures["loop_ms"] / single}
    return barred(figures, Bar("times faster than the block loop", figures["loop_ms"] / figures["ms"], 15, True))
