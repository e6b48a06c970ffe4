"""Errors against float64, and whether they are small enough."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, rows_of
from benchmarks.gpu.machine import DEVICE, LAUNCHED_ONLY

ANCHORS = 256  # checked in float64
LOSS_SCALE = 4096.0  # as a trainer's: gradients of half-precision maps would be denormal
ERRORS = {"float16": 1e-2, "bfloat16": 1e-2, "tf32": 1e-2, "float32": 1e-4}  # largest relative error, by arithmetic


def distance(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; infinite where anything is not finite."""
    error = float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


def expect(holds: bool, message: str) -> None:
    """AssertionError unless it holds. Where kernels are launched and do not run, nothing can be expected."""
    if not (holds or LAUNCHED_ONLY):
        raise AssertionError(message)


def judged(value: float, gradient: float, arithmetic: str) -> dict[str, Any]:
    """The errors as figures of a row; AssertionError where they are too large."""
    most = ERRORS[arithmetic]
    expect(
        value <= most and gradient <= most, f"relative error {value:.2e}, of the gradient {gradient:.2e}, not {most}"
    )
    return {"error_value": value, "error_gradient": gradient, "allowed_error": most}


def errors(case: Case, arithmetic: str) -> dict[str, Any]:
    """Losses of random anchors and their gradients, in all rows, against the dense form in float64."""
    n = case.labels.numel()
    chosen = torch.randperm(n, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)[:ANCHORS]
    losses = case.loss(*case.leaves, reduction="none").reshape(-1)[chosen]
    grads = torch.autograd.grad(losses.sum() * LOSS_SCALE, case.leaves)
    if LAUNCHED_ONLY:
        return {}
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    exact = case.exact(chosen, *leaves)
    gradient = [0.0]
    for found, wanted in zip(grads, torch.autograd.grad(exact.sum() * LOSS_SCALE, leaves)):
        parts: list[Any] = [...]
        if wanted.dim() > 1:  # the anchors, and the rows that are keys alone, whose gradients are far smaller
            found, wanted, anchor = rows_of(found), rows_of(wanted), torch.isin(torch.arange(n, device=DEVICE), chosen)
            parts = [part for part in (anchor, ~anchor) if part.any()]
        gradient += [distance(found[part], wanted[part]) for part in parts]
    return judged(distance(losses, exact), max(gradient), arithmetic)
