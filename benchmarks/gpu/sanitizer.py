"""The last stage: compute-sanitizer over small problems of every kernel and of the native library.

No access out of bounds; where it is not installed, or has no time, the document says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import GPU, processes, tests

FILES = tuple(f"kernels/test_{name}.py" for name in ("pair_cross_entropy", "edges", "pair_lse", "segments", "gpu"))
CHOSEN = (
    "(test_sizes and 33) or (test_edges and runs) or test_pair_lse_both or test_prototypes"
    " or (test_native_is_the_same and not 4096) or test_native_reads"
)
FOUND = 9


def command(tool: str) -> list[str]:
    return [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), *tests.command(FILES, "-x", "-k", CHOSEN)]


def run(kind: str, out: Path, left: Callable[[], float], around: Mapping[str, str | None]) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    said = {"command": " ".join(command(tool or "compute-sanitizer")), "log": "sanitizer.log"}
    if kind != GPU or tool is None:
        message = "compute-sanitizer is not installed" if kind == GPU else "no device to watch"
        return {"status": "not run", "message": message, **said}
    return said | watched(command(tool), out, left, around)


def watched(
    command: list[str], out: Path, left: Callable[[], float], around: Mapping[str, str | None]
) -> dict[str, Any]:
    """How the command ended. Killed at its limit, it has found nothing until then, and that is said."""
    began, results = time.monotonic(), out / "sanitizer.jsonl"
    results.write_text("")
    environment = {**around, **tests.environment(0, 1, results), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = processes.run(command, out / "sanitizer.log", left(), environment)
    found = tests.summary([tests.lines(results)], ["no time" if status is None else "exit status 0"], time.time())
    found |= {"seconds": time.monotonic() - began}
    if status:
        printed = (out / "sanitizer.log").read_text(errors="replace")[-600:]
        return found | {"status": "failed", "message": f"{processes.how(status)}: {printed}"}
    return found
