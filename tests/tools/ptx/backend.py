"""The Triton backend on tensors of the CPU, with its kernels compiled for a GPU and their PTX interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from hpcloss import backends
from hpcloss.backends.triton import probe, trial
from tests.tools import offline
from tests.tools.ptx.launch import Kernel
from tests.tools.ptx.memory import POISON


class Machine:
    """A GPU of a compute capability. kernels: those that ran, by their PTX. change: makes the PTX that runs of it."""

    def __init__(self, capability: int, change: Callable[[str], str] = lambda ptx: ptx) -> None:
        self.capability, self.change = capability, change
        self.kernels: dict[str, Kernel] = {}

    def hazards(self) -> dict[str, str]:
        """Each kind of hazard that was noted, and where."""
        return {
            kind: f"{kernel.program.name}: {kernel.hazards}"
            for kernel in self.kernels.values()
            for kind, _ in kernel.hazards.counts
        }

    def run(self, function: Any, built: Any, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """One launch."""
        ptx = built.asm["ptx"]
        if ptx not in self.kernels:
            self.kernels[ptx] = Kernel(self.change(ptx), built.metadata.shared)
        given = dict(zip(function.arg_names, args)) | options
        taken = [
            (member, float(value) if kind in ("fp32", "fp64") else value)
            for name in function.arg_names
            for member, kind, value in _flat(name, built.src.signature[name], given.get(name))
        ]
        values, names = [value for _, value in taken], [name for name, _ in taken]
        self.launch(self.kernels[ptx], ptx, built.metadata.shared, *grid, values, names)

    def launch(self, kernel: Kernel, ptx: str, shared: int, programs: int, given: list[Any], names: list[str]) -> None:
        """`ptx` is what the compiler made, `given` what the kernel takes."""
        kernel.launch(programs, given, names)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block backend "triton" takes tensors of the CPU and launches here; new memory is poison."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(offline.launched(self.capability, self.run))
            stack.enter_context(mock.patch.object(probe, "why_not", lambda device, index: None))
            stack.enter_context(mock.patch.object(trial, "failure", lambda *_: ("", True)))  # or it runs each time
            backends.forget()
            stack.callback(backends.forget)
            for owner, name in (
                (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
            yield


def _flat(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """What a kernel takes of an argument: nothing of a constant, the members of a group. Name, type and value."""
    if isinstance(kind, tuple):
        for member, *part in zip(getattr(value, "_fields", range(len(kind))), kind, value):
            yield from _flat(f"{name}.{member}", *part)
    elif kind != "constexpr":
        yield name, kind, value


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        made = make(*args, **options)
        if made.is_floating_point() and made.element_size() in (2, 4) and made.numel():
            whole = torch.as_strided(made.detach(), (made.untyped_storage().nbytes() // made.element_size(),), (1,), 0)
            whole.view(torch.int32 if made.element_size() == 4 else torch.int16).fill_(POISON[made.element_size()])
        return made

    return poisoned
