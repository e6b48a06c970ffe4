"""Kernels compiled for GPUs that are not here: what the backend would launch, and what the compiler makes of it.

Run the backend on CPU tensors with its launcher replaced by a recorder, then compile each recorded launch for a target.
Needs a process without TRITON_INTERPRET. `python -m tests.tools.kernel_table 90 128` prints what is found.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from hpcloss.backends import triton as backend
from hpcloss.backends.triton import configs, launch
from hpcloss.plan.partition import one_to_one, partition
from tests.tools.machine_code import MachineCode, disassembled

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPERATIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDL", "STL", "MUFU", "FFMA")
# Shared memory a program may have, by compute capability.
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# AMD parts have no compute capability; the backend calls it 0. Each has 64 KB of shared memory.
AMD, AMD_SHARED_LIMIT = ("gfx90a", "gfx942"), 65536


class Launch(NamedTuple):
    """One recorded call of a kernel; options: how its programs are run, num_warps and num_stages."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What the compiler made of it. spilled_bytes: the stack, of which these kernels have no other use."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    operations: Counter[str]
    code: MachineCode

    def __str__(self) -> str:
        return f"{self[:4]}"


class CompiledForAMD(NamedTuple):
    """Registers of a lane (accumulation registers among them), of a wave; what of both is spilled, in registers."""

    vector_registers: int
    accumulation_registers: int
    scalar_registers: int
    spilled_vectors: int
    spilled_scalars: int
    scratch_bytes: int
    shared_bytes: int
    matrix: int  # instructions of the matrix units


@contextlib.contextmanager
def recorded(capability: int, tiles: configs.Config | None = None):
    """The launches of the backend inside the block, as on a GPU of this compute capability; nothing runs."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, like: Any, *args: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
        launches.append(Launch(kernel, args, constants, options))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "run", record))
        stack.enter_context(mock.patch.object(configs, "capability", lambda device: capability))
        if tiles is not None:
            stack.enter_context(mock.patch.object(configs, "config", lambda *_: tiles))
        yield launches


class Device:
    """As much of a GPU's driver as Triton asks before it loads a kernel; each compute capability is a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def launched(capability: int, run: Any = None):
    """The kernels that the backend launches inside the block, through Triton's own launch up to loading them.

    Triton binds and specialises the arguments, finds the kernel that it made of them or compiles it, and compares the
    globals that it uses. What Triton made is yielded, one entry a launch, and given to `run` with the kernel's grid and
    arguments, of which those of the constants are named.
    """
    built: list[tuple[Any, Any]] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            built.append((kernel, kernel.run(*args, grid=grid, warmup=True, **options)))
            if run is not None:
                run(*built[-1], grid, args, options)

        return launch

    with contextlib.ExitStack() as stack:
        # Its own method that resets it would look for a GPU.
        stack.callback(vars(driver).update, dict(vars(driver)))
        driver.set_active(Device(capability))
        stack.enter_context(mock.patch.object(triton.JITFunction, "__getitem__", launcher))
        stack.enter_context(mock.patch.object(configs, "capability", lambda device: capability))
        yield built


def kernels() -> set[Any]:
    """What the backend launches: its functions of Triton that end without a value and that no other of them calls."""
    functions: set[Any] = set()
    for module in pkgutil.walk_packages(backend.__path__, backend.__name__ + "."):
        found = vars(importlib.import_module(module.name)).values()
        functions |= {function for function in found if isinstance(function, triton.JITFunction)}
    called = {name for function in functions for name in inspect.getclosurevars(function.fn).globals}
    return {f for f in functions if f.__name__ not in called and not re.search(r"^ +return ", f.src, re.MULTILINE)}


def build(recorded_launch: Launch, target: GPUTarget) -> Any:
    """A recorded launch compiled for a target."""
    kernel = recorded_launch.kernel
    given = dict(zip(kernel.arg_names, recorded_launch.args)) | recorded_launch.constants
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        """The type of an argument, or of each member of a group of them."""
        parameter = kernel.params[path[0]]
        if isinstance(value, tuple):
            return type(value)(*(kind(member, (*path, number)) for number, member in enumerate(value)))
        if isinstance(value, torch.Tensor):
            if not parameter.do_not_specialize:
                attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if value is None or isinstance(value, bool | str | triton.JITFunction) or parameter.is_constexpr:
            constants[path] = value
            return "constexpr"
        return parameter.annotation_type or ("i32" if isinstance(value, int) else "fp32")

    signature = {name: kind(given[name], (position,)) for position, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=recorded_launch.options | {"enable_fp_fusion": True})


def compile_for(recorded_launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch for a compute capability, and look at the machine code."""
    built = build(recorded_launch, GPUTarget("cuda", capability, 32))
    usage, text = disassembled(built.asm["cubin"])
    operations = Counter(re.findall(r"\b(" + "|".join(OPERATIONS) + r")\b", text))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return Compiled(registers, stack, built.metadata.shared, operations, MachineCode(text))


def compile_for_amd(recorded_launch: Launch, architecture: str) -> CompiledForAMD:
    """Compile a recorded launch for an AMD part, and read the assembly."""
    built = build(recorded_launch, GPUTarget("hip", architecture, 64))
    text = built.asm["amdgcn"]
    said = {name: int(number) for name, number in re.findall(r"^[ -]*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return CompiledForAMD(
        said["vgpr_count"], said["agpr_count"], said["sgpr_count"], said["vgpr_spill_count"], said["sgpr_spill_count"],
        said["private_segment_fixed_size"], built.metadata.shared, len(re.findall(r"\bv_mfma", text)),
    )  # fmt: skip


def calls(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The backend's calls that compile different kernels; each a function without arguments."""
    n = 32
    x, k = torch.zeros(n, dim, dtype=dtype), torch.zeros(n, dim, dtype=dtype)
    own = list(partition(torch.arange(n) % 3, background=0).intervals)
    cross = list(one_to_one(n, torch.device("cpu")).intervals)
    scale, row = torch.ones(()), torch.zeros(n)
    many, wide = torch.zeros(2000, dim, dtype=dtype), torch.zeros(2000)
    segments_of_many = list(partition(torch.arange(2000) % 3, background=0).intervals)

    def lse(rule: str, bound: float | None, keys: Any = None, at: Any = own) -> Any:
        return lambda: backend.pair_lse(x, keys, None, scale, bound, at, rule)

    def lse_backward(
        rule: str, bound: float | None, needs: Any = (True, False, False), keys: Any = None, at: Any = own
    ):
        return lambda: backend.pair_lse_backward(row, row, x, keys, None, scale, bound, at, rule, *needs)

    def mean(stat: Any, bound: float | None, hardness: float, keys: Any = None, at: Any = own) -> Any:
        return lambda: backend.pair_mean(x, keys, stat, None, scale, bound, hardness, 0.0, at)

    def mean_backward(
        stat: Any, bound: float | None, hardness: float, detach: bool = True, needs: Any = (True, False, False),
        keys: Any = None, at: Any = own,
    ):  # fmt: skip
        return lambda: backend.pair_mean_backward(
            row, row, row, x, keys, stat, None, scale, bound, hardness, 0.0, detach, at, *needs
        )

    def packing(channels_last: bool, normalize: bool) -> Any:
        features = torch.zeros(2, dim, 4, 4, dtype=dtype)
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        order, live, layout = (
            torch.arange(n),
            torch.ones(1, dtype=torch.int32),
            (list(features.shape), list(features.stride()), dtype),
        )

        def both() -> None:
            data, inverse = backend.pack(features, order, live, normalize)
            backend.pack_backward(data.float(), data, inverse, order, normalize, *layout, True)

        return both

    def pairs_of_both(needs: Any) -> Any:
        return lambda: backend.pair_lse_both_backward(row, row, row, row, x, k, scale, 10.0, cross, "every", *needs)

    def cross_entropy(hardness: float, keys: Any = None, at: Any = own) -> Any:
        return lambda: backend.pair_cross_entropy(x, keys, scale, 10.0, hardness, at)

    def cross_entropy_backward(
        hardness: float, needs: Any = (True, False, False), keys: Any = None, at: Any = own, grad_lse: Any = None
    ) -> Any:
        return lambda: backend.pair_cross_entropy_backward(
            row, grad_lse, row, row, row, x, keys, scale, 10.0, hardness, at, *needs
        )

    def discounted(keys: Any, needs: Any, at: Any, bound: float | None = 10.0) -> Any:
        return lambda: backend.pair_mean_backward(
            row, row, row, x, keys, row, None, scale, bound, 1.0, 0.2, bound is not None, at, *needs
        )

    return {
        "lse of positives, bias": lambda: backend.pair_lse(x, None, row, scale, None, own, "positives"),
        "lse backward, bias": lambda: backend.pair_lse_backward(
            row, row, x, None, row, scale, None, own, "positives", True, False, True
        ),
        "both backward": pairs_of_both((True, False, False)),
        "both backward, scale": pairs_of_both((False, True, True)),
        "mean, discount, weights": lambda: backend.pair_mean(x, k, row, row, scale, None, 1.0, 0.2, cross),
        "mean backward, anchors": discounted(k, (True, False, False), cross),
        "mean backward, keys": discounted(k, (False, True, False), cross),
        "mean backward, discount": discounted(None, (True, False, False), own),
        "mean backward, discounted weights": discounted(None, (True, False, False), own, None),
        "pack, channels first": packing(False, True),
        "pack, channels last": packing(True, True),
        "pack, raw": packing(False, False),
        "linear mean": lambda: backend.pair_mean(many, None, None, None, scale, 10.0, 0.0, 0.0, segments_of_many),
        "linear mean backward": lambda: backend.pair_mean_backward(
            wide, wide, wide, many, None, None, None, scale, 10.0, 0.0, 0.0, True, segments_of_many, True, False, False
        ),
        "segment mean": lambda: backend.segment_mean(many, torch.arange(4, dtype=torch.int32) * 100),
        "lse": lse("negatives", 10.0),
        "lse, online": lse("others", None),
        "mean": mean(row, 10.0, 1.0),
        "mean, uniform": mean(row, 10.0, 0.0),
        "mean, online": mean(row, None, 1.0),
        "lse backward": lse_backward("negatives", 10.0),
        "lse backward, online": lse_backward("others", None, (True, False, True)),
        "lse backward, anchors": lse_backward("every", 10.0, (True, False, False), k, cross),
        "lse backward, keys": lse_backward("every", 10.0, (False, True, False), k, cross),
        "mean backward": mean_backward(row, 10.0, 1.0),
        "mean backward, uniform": mean_backward(row, 10.0, 0.0),
        "mean backward, online": mean_backward(row, None, 1.0, True, (True, False, True)),
        "mean backward, weights": mean_backward(row, None, 1.0, False),
        "cross-entropy": cross_entropy(0.0),
        "cross-entropy, weights": cross_entropy(1.0, k, cross),
        "cross-entropy backward": cross_entropy_backward(0.0),
        "cross-entropy backward, weights": cross_entropy_backward(1.0, (True, False, True), grad_lse=row),
        "cross-entropy backward, anchors": cross_entropy_backward(0.0, (True, False, False), k, cross),
        "cross-entropy backward, keys": cross_entropy_backward(1.0, (False, True, False), k, cross),
        "logit backward, keys": mean_backward(None, 10.0, 0.0, True, (False, True, False), k, cross),
    }
