"""Losses of this package: errors, then times of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.cases import HALF, SINGLE, Case, D, rows_of
from benchmarks.gpu.check import distance, errors, expect, judged
from benchmarks.gpu.known import Known, barred
from benchmarks.gpu.machine import BACKEND, LAUNCHED_ONLY
from benchmarks.gpu.timing import step_figures
from benchmarks.measure import Bar


def loss_row(
    run: Known, make: Callable[..., Case], *, share: float | None = None, precision: str = "highest",
    more: Callable[[Known, dict[str, Any]], list[Bar]] | None = None, **parameters: Any,
) -> dict[str, Any]:  # fmt: skip
    """Errors, then times, of a loss; `share`: the bar of its share of the matmul rate; `more`: other bars."""
    torch.set_float32_matmul_precision(precision)
    try:
        case = make(**parameters)
        dtype = str(case.leaves[0].dtype).removeprefix("torch.")
        arithmetic = "tf32" if dtype == "float32" and precision != "highest" else dtype
        figures = {"n": case.labels.numel(), "dim": case.leaves[0].shape[1], "dtype": dtype, "flops": case.flops}
        figures |= errors(case, arithmetic) | step_figures(case.step, case.leaves, run.seconds)
    finally:
        torch.set_float32_matmul_precision("highest")
    bars = []
    if rate := run.ceilings.get(arithmetic):
        figures["share"] = 3e3 * case.flops / figures["ms"] / rate
        bars += [Bar("share of the matmul rate", figures["share"], share, at_least=True)] if share else []
    return barred(figures, *bars, *(more(run, figures) if more else ()))


def less_than_whole(run: Known, figures: dict[str, Any]) -> list[Bar]:
    whole = run.figure("hpc dense", "ms")
    return [Bar("time over that without background", figures["ms"] / whole, 0.45)] if whole else []


def as_good_as_small(run: Known, figures: dict[str, Any]) -> list[Bar]:
    share, peak, elements = run.figure("hpc dense", "share"), figures["peak_bytes"], figures["n"] * figures["dim"]
    bars = [Bar("share over that at 65 536", figures["share"] / share, 0.95, at_least=True)] if share else []
    return bars + ([Bar("peak bytes per feature element", peak / elements, 14)] if peak else [])


def whole_step_row(run: Known, make: Callable[..., Case], **parameters: Any) -> dict[str, Any]:
    """Value and gradient of the mean over all anchors, against the PyTorch tiles in float64."""
    case = make(**parameters)
    found = []
    for backend, cast in ((BACKEND, HALF), ("blockwise", torch.float64))[: 1 if LAUNCHED_ONLY else 2]:
        leaf = case.leaves[0].detach().to(cast).requires_grad_()
        loss = case.loss(leaf, backend=backend)
        found.append((loss, torch.autograd.grad(loss * case.labels.numel() * 16, leaf)[0]))
    if LAUNCHED_ONLY:
        return {}
    (loss, grad), (exact, exact_grad) = found
    return judged(distance(loss, exact.double()), distance(grad, exact_grad), "float16")


def small_row(
    run: Known, make: Callable[..., Case], eager: Callable[[Case], Tensor], **parameters: Any
) -> dict[str, Any]:
    """A small problem in fp32 beside the dense loss in eager mode, and beside the dense backend.

    Where the dense backend is faster, `auto` should take it: its table is `hpcloss/backends/pytorch.py`.
    """
    case = make(**parameters, dtype=SINGLE)
    figures = {"n": case.labels.numel(), "dim": D, "dtype": "float32", **errors(case, "float32")}
    expect(distance(eager(case).double(), case.step().double()) < 1e-3, "the eager loss has another value")
    figures |= step_figures(case.step, case.leaves, run.seconds)
    figures["eager_ms"] = step_figures(lambda: eager(case), case.leaves, run.seconds)["ms"]
    dense = functools.partial(case.loss, *case.leaves, backend="dense")
    expect(distance(dense().double(), case.step().double()) < 1e-3, "the dense backend has another value")
    figures["dense_ms"] = step_figures(dense, case.leaves, run.seconds)["ms"]
    return barred(figures, Bar("time over eager", figures["ms"] / figures["eager_ms"], 1.0))


def eager_supcon(case: Case) -> Tensor:
    return peers.eager_supcon(case.leaves[0], case.labels)


def eager_phpc(case: Case) -> Tensor:
    return peers.eager_phpc(rows_of(case.leaves[0]), case.labels.reshape(-1))
