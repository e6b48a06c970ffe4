"""One step in a fresh process: what it needs beyond its inputs; with "thorough" also what it takes, checked before.

    python benchmarks/fresh.py '{"case": "supcon", "count": 8192, "thorough": true}'

The peak is that of resident memory, the only one that counts what the libraries below torch allocate. It is compared
with resident memory just before the step, when the inputs exist and a small step has loaded code and libraries. The
gradient of the inputs is part of it. A step may take `MAX_GIGABYTES` of address space more than it has found.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import torch
from cases import CASES, OURS, Case
from measure import MAX_GIGABYTES, assert_same_as, clock
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hpcloss

MEGABYTE = 2**20
MOST_STEPS = 100  # a few steps of 16 rows say nothing
# What a small step of the same case is built from, to load everything that a first call loads, and to be checked.
SMALL = {"count": 64, "batch": 2, "height": 16, "width": 16, "classes": 4}


def measure(case: str, timeout: float = 240.0, **parameters: object) -> dict[str, float]:
    """Run a case in a process of its own: peak memory "extra_mb" beyond the inputs and "seconds" of the first step.

    With thorough=True also median "forward_seconds" and "backward_seconds", "loss" and "gradient" (its norm), by which
    methods can be compared, and "syncs". {"out_of_memory": True} alone where the step needs too much.
    """
    return run(Path(__file__), json.dumps({"case": case, **parameters}), timeout)


def run(script: Path, request: str, timeout: float) -> dict:
    """What a script of this folder prints last, as JSON, when a process of its own is given a request."""
    # The package that this process uses, whether it is installed or stands in the working directory.
    package = str(Path(hpcloss.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script.resolve()), request],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{request}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------------- memory


def _status(field: str) -> float | None:
    """A field of /proc/self/status in bytes, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _forget_peak() -> bool:
    """Make resident memory of now the peak so far; whether the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass  # another C library: what is free and resident is then missing from the measured peak


def _largest_resident() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@contextlib.contextmanager
def limited(gigabytes: float):
    """Allocations fail beyond so much more address space, where the system tells how much there is."""
    used, (soft, hard) = _status("VmSize"), resource.getrlimit(resource.RLIMIT_AS)
    if used is not None:
        resource.setrlimit(resource.RLIMIT_AS, (int(used + gigabytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


# ---------------------------------------------------------------------------------------------------------- time


def _forward_and_backward(case: Case) -> tuple[float, float]:
    """Median seconds of either pass, over as many steps as fit in a second, but 3 to `MOST_STEPS`."""
    steps: list[tuple[float, float]] = []
    while len(steps) < 3 or (len(steps) < MOST_STEPS and sum(map(sum, steps)) < 1):
        for leaf in case.leaves:
            leaf.grad = None
        start = clock()
        loss = case.loss(*case.arguments)
        middle = clock()
        loss.backward()
        steps.append((middle - start, clock() - middle))
    forward, backward = zip(*steps, strict=True)
    return statistics.median(forward), statistics.median(backward)


# ---------------------------------------------------------------------------------------------------- host syncs

# Operators whose result or shape a GPU would have to tell the host, and what fetches a tensor in Python.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "bincount",
}  # fmt: skip
FETCHING = {"cpu", "numpy", "tolist"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        by_mask = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in WAITING or by_mask or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in FETCHING:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def host_syncs(case: Case, device: str) -> list[str]:
    """What of one step would make the host wait for a GPU.

    On "cpu" peers do what they would do there. This package reads ahead on a CPU, so it is asked for on "meta": there
    it takes the path of a GPU, and whatever it wanted to read would fail.
    """
    arguments = [x.detach().to(device).requires_grad_(x.requires_grad) for x in case.arguments]
    seen: list[str] = []
    with contextlib.ExitStack() as stack:
        if device == "meta":  # which has no autocast
            unchanged = unittest.mock.patch("torch.autocast", lambda *args, **options: contextlib.nullcontext())
            stack.enter_context(unchanged)
        stack.enter_context(_Methods(seen))
        stack.enter_context(_Operators(seen))
        case.loss(*arguments).backward()
    return seen


# ---------------------------------------------------------------------------------------------------------- main


def main(request: str) -> dict[str, object]:
    parameters = json.loads(request)
    name, threads = parameters.pop("case"), parameters.pop("threads", 1)
    thorough, gigabytes = parameters.pop("thorough", False), parameters.pop("max_gigabytes", MAX_GIGABYTES)
    is_compiled = name.startswith("compiled")  # each size is built anew: seconds

    torch.set_num_threads(threads)
    small = {key: min(value, SMALL[key]) if key in SMALL else value for key, value in parameters.items()}
    if not is_compiled:
        little = CASES[name](**small)
        assert_same_as(little) if thorough and little.exact else little.step()
    case = CASES[name](**parameters)
    if is_compiled:
        case.step()  # building left its own peak behind
    for leaf in case.leaves:
        leaf.grad = None
    _return_free_memory()
    can_forget = _forget_peak()
    before = _status("VmRSS") if can_forget else _largest_resident()
    start = time.perf_counter()
    try:
        with limited(gigabytes):
            loss = case.step()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return {"out_of_memory": True}
        raise
    seconds, peak = time.perf_counter() - start, _status("VmHWM") if can_forget else _largest_resident()
    assert before is not None and peak is not None
    found = {"extra_mb": round((peak - before) / MEGABYTE, 1), "seconds": round(seconds, 4)}
    if thorough:
        gradient = torch.stack([leaf.grad.double().norm() for leaf in case.leaves]).norm()
        found |= {"loss": loss.item(), "gradient": gradient.item()}
        found["forward_seconds"], found["backward_seconds"] = _forward_and_backward(case)
        if not is_compiled:
            found["syncs"] = len(host_syncs(case, "meta" if name in OURS else "cpu"))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
