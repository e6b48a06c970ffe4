"""Peak memory of one step, in a fresh process: what it needs beyond its inputs.

    python benchmarks/memory.py '{"case": "supcon", "count": 8192}'

The peak is that of resident memory, the only one that counts what the libraries below torch allocate. It is compared
with resident memory just before the step, when the inputs exist and a small step has loaded code and libraries. The
gradient of the inputs is part of it.
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import CASES

import hpcloss

MEGABYTE = 2**20
# What a small step of the same case is built from, to load everything that a first call loads.
SMALL = {"count": 64, "batch": 2, "height": 16, "width": 16}


def measure(case: str, timeout: float = 240.0, **parameters: object) -> dict[str, float]:
    """Run one step in a process of its own: peak memory "extra_mb" beyond the inputs, and "seconds"."""
    request = json.dumps({"case": case, **parameters})
    # The package that this process uses, whether it is installed or stands in the working directory.
    package = str(Path(hpcloss.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), request],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"memory of {request}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def main(request: str) -> dict[str, float]:
    parameters = json.loads(request)
    name, threads = parameters.pop("case"), parameters.pop("threads", 1)

    torch.set_num_threads(threads)
    small = {key: min(value, SMALL[key]) if key in SMALL else value for key, value in parameters.items()}
    CASES[name](**small).step()
    case = CASES[name](**parameters)
    if name.startswith("compiled"):
        case.step()  # building left its own peak behind
    for leaf in case.leaves:
        leaf.grad = None
    _return_free_memory()
    if _forget_peak():
        before = _status("VmRSS")
        start = time.perf_counter()
        case.step()
        seconds, peak = time.perf_counter() - start, _status("VmHWM")
    else:
        before = _largest_resident()
        start = time.perf_counter()
        case.step()
        seconds, peak = time.perf_counter() - start, _largest_resident()
    assert before is not None and peak is not None
    return {"extra_mb": round((peak - before) / MEGABYTE, 1), "seconds": round(seconds, 4)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
