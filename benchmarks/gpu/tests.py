"""The stage of the GPU tests: pytest in several processes, within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import GPU, INTERPRETER, MACHINE, limits
from benchmarks.gpu.processes import end, how, start

KERNELS = (
    "gpu", "pack", "pair_lse", "pair_lse_keys", "pair_mean", "pair_mean_keys", "pair_cross_entropy", "edges",
    "gradients", "operators", "losses", "segments", "linear_mean", "compile_and_graphs",
)  # fmt: skip
FILES = tuple(f"kernels/test_{name}.py" for name in KERNELS)
PROCESSES = 13  # one for the large tests, twelve for the rest
WITHOUT_KERNELS = ("repository/test_numerics.py",)  # for a run without a GPU
SKIP_PREFIX = "Skipped: "


def command(files: Iterable[str], *options: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider",
        "-p", "benchmarks.gpu.share", "-W", "ignore:Failed to initialize NumPy", *options,
        *(f"tests/{name}" for name in files),
    ]  # fmt: skip


def environment(part: int, parts: int, results: Path) -> dict[str, str | None]:
    return {
        "HPCLOSS_SHARE": f"{part}/{parts}", "HPCLOSS_RESULTS": str(results), "TRITON_INTERPRET": None, MACHINE: None,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the tests ask for deterministic algorithms
        "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip


def run(kind: str, out: Path, left: Callable[[], float], around: Mapping[str, str | None]) -> dict[str, Any]:
    """Results, or the commands alone where kernels do not run."""
    files = WITHOUT_KERNELS if kind == INTERPRETER else FILES
    parts = min(PROCESSES, os.cpu_count() or 1) if kind == GPU else 1
    said = {"command": " ".join(command(files)), "processes": parts}
    if kind not in (GPU, INTERPRETER):
        return {"status": "not run", "message": "kernels do not run here", **said}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, f"{part}.jsonl") for part in range(parts)]
        ends = processes(command(files), results, out / "tests.log", left, around)
        found = summary([lines(path) for path in results], ends, time.time())
    return found | said | {"seconds": time.monotonic() - began, "log": "tests.log"}


def processes(
    command: list[str], results: list[Path], log: Path, left: Callable[[], float], around: Mapping[str, str | None]
) -> list[str]:
    """Runs a process for each file of results; how each ended, "no time" if it was killed."""
    running, ends = [], []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in results]
        for part, (path, output) in enumerate(zip(results, outputs, strict=True)):
            path.touch()
            own = {**around, **environment(part, len(results), path)}
            running.append(start(command, own, output))
            stack.callback(end, running[-1])
        for process in running:
            try:
                ends.append(how(process.wait(max(left(), 0.1))))
            except Exception:  # its time is up
                ends.append("no time")
            end(process)
        with log.open("w") as whole:
            for said, output in zip(ends, outputs, strict=True):
                output.seek(0)
                whole.write(f"{output.read()}\n{said}\n\n")
    return ends


def lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # cut off
            found.append(json.loads(line))
    return found


def summary(results: list[list[dict[str, Any]]], ends: list[str], stopped: float) -> dict[str, Any]:
    """Counts, skips by their reason, and what had no time.

    A test that was running for long when its process was stopped has failed, as has one whose process broke.
    """
    outcomes: dict[str, str] = {}
    skips: Counter[str] = Counter()
    failures, not_run, kernels = [], 0, Counter()
    for told, ended in zip(results, ends, strict=True):
        tests = {line["test"]: line for line in told if "test" in line}
        for name, line in tests.items():
            outcomes[name] = line["outcome"]
            if line["outcome"] == "skipped":
                skips[line["reason"].removeprefix(SKIP_PREFIX)] += 1
        kernels += Counter(next((line["kernels"] for line in reversed(told) if "kernels" in line), {}))
        failures += [name for name, line in tests.items() if line["outcome"] == "failed"]
        chosen = next((line["chosen"] for line in told if "chosen" in line), None)
        begun = [line for line in told if "begin" in line and line["begin"] not in tests]
        if ended == "no time":
            hanging = [line["begin"] for line in begun if stopped - line["at"] > limits.ONE_TEST]
            failures += [f"{name}: ran for more than {limits.ONE_TEST:.0f} s when it was stopped" for name in hanging]
            not_run += (chosen or 0) - len(tests) - len(hanging)
        elif ended not in ("exit status 0", "exit status 1", "exit status 5"):
            failures.append(f"{begun[-1]['begin'] if begun else 'a process'}: {ended}")
    counts = Counter(outcomes.values())
    if not (counts["passed"] or failures or "no time" in ends):
        failures.append("not one test passed")
    status = "failed" if failures else "left out" if not_run or not counts["passed"] else "ok"
    return {
        "status": status, "passed": counts["passed"], "failed": len(failures), "skipped": counts["skipped"],
        "xfailed": counts["xfailed"], "not_run": not_run, "skips": dict(skips.most_common()), "failures": failures,
        "kernels": dict(kernels),
    }  # fmt: skip
