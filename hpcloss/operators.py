"""Registration of operators with torch: a schema of plain tensors, a Python body and a fake.

Their callers (`hpcloss.primitives`) do autograd.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# A row at most this long has no direction: it becomes zero and gets no gradient. Division by a floor would give such
# a row a gradient that is 1e12 times too large.
NORM_EPS = 1e-12


def statistics_dtype(rows: torch.dtype) -> torch.dtype:
    """Dtype of the statistics, losses and gradients of rows: fp32, or float64 for float64 rows."""
    return torch.float64 if rows == torch.float64 else torch.float32


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a plain tensor, differentiably, if its class is a Python subclass such as MONAI's MetaTensor.

    Methods of such classes take other arguments than torch's and carry metadata. Subclasses without data of their own
    (`__torch_dispatch__`: fake and distributed tensors) are returned as they are.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return tensor
    return tensor if _is_dispatched(type(tensor)) else tensor.as_subclass(torch.Tensor)


@functools.cache
def load(backend: str) -> ModuleType:
    """The package of a backend, imported in the first call."""
    return importlib.import_module(f"hpcloss.backends.{backend}")


def is_traced() -> bool:
    """Whether a graph is traced, or another mode watches the operators of torch."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


class Operators:
    """The operators by name: `ops.pack(...)`.

    A call goes through `torch.ops.hpcloss` if a graph is traced or another mode watches. Otherwise it calls the body,
    because torch's dispatch takes longer than the work on a few rows.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"there is no operator {name!r}")


ops = Operators()


def register(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.hpcloss.<name>`. The body runs without autocast, because it chooses its own precision."""
    _define(name, schema, fake, lambda args: (body, args))


def register_on_backends(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define `torch.ops.hpcloss.<name>`, which the backend in the last argument computes.

    The body is the backend's function of the same name. It takes the arguments before the last one.
    """
    _define(name, schema, fake, lambda args: (getattr(load(args[-1]), name), args[:-1]))


def _define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    chosen: Callable[[Sequence[Any]], tuple[Callable[..., Any], Sequence[Any]]],
) -> None:
    """Define an operator and its entry in `ops`. chosen: the body of a call, and the arguments that it takes."""

    def run_without_autocast(*args: Any) -> Any:
        given = [plain(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        device = next(arg for arg in given if isinstance(arg, torch.Tensor)).device.type
        body, taken = chosen(given)
        with torch.autocast(device, enabled=False):
            return body(*taken)

    def call(*args: Any) -> Any:
        if is_traced():
            return operator(*args)
        device = ""
        for arg in args:
            if type(arg) is torch.Tensor:
                device = device or arg.device.type
            elif isinstance(arg, torch.Tensor):
                return operator(*args)  # torch may have to dispatch a subclass
        if device in ("", "meta") or torch.is_autocast_enabled(device):
            return operator(*args)
        body, taken = chosen(args)
        return body(*taken)

    torch.library.define(f"hpcloss::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"hpcloss::{name}", "default", run_without_autocast)
    torch.library.register_fake(f"hpcloss::{name}", fake)
    operator = getattr(torch.ops.hpcloss, name).default
    setattr(ops, name, call)


@functools.cache
def _is_dispatched(kind: type) -> bool:
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]


def differentiable_once(backward: Callable[..., tuple[torch.Tensor | None, ...]]) -> Callable[..., Any]:
    """Decorate the backward of an autograd function that has no derivative of its own.

    With `create_graph=True` its results carry an error, so they do not pass for constants. They depend on everything
    that backward read, saved tensors too (`torch.autograd.function.once_differentiable` leaves those out), so a second
    derivative by any input reaches the error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        read = _ReadOnce(ctx)
        with torch.no_grad():
            results = backward(read, *grads)
        causes = [x for x in (*grads, *read.saved_tensors) if x is not None and x.requires_grad]
        return tuple(
            None if value is None else _NotTwice.apply(value.detach().requires_grad_(), *causes) for value in results
        )

    return once


class _ReadOnce:
    """A context whose saved tensors are fetched once, because activation checkpoints return them only once."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *causes: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the losses of hpcloss can be differentiated only once")
