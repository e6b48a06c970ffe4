"""A child process: the smoke test, or a group of rows. `python -m benchmarks.gpu.worker FD`, for the supervisor alone.

Reads one line of JSON, the request; answers lines of JSON on the descriptor FD: {"begin": name} before a row, then the
row, and {"done": ...} at the end. What goes to stdout and stderr is the log.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import traceback
import warnings
from collections import Counter
from typing import Any

import torch

from benchmarks.gpu import cache, interpreter, machine
from benchmarks.gpu.known import Known

BROKEN = ("CUDA error", "Triton Error [CUDA]", "device-side assert")  # after these the context is lost
TIMES = ("ms", "share", "error", "errors", "peak", "times", "bars", "launches", "names", "ceilings")


class Worker:
    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self.answers = os.fdopen(descriptor, "w")
        self.stand_in = None

    def say(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def set_up(self) -> None:
        """The stand-in for the driver, or what Triton's interpreter needs; kernels are counted as they are built."""
        if machine.LAUNCHED_ONLY:
            from benchmarks.gpu.stand_in import StandIn

            self.stand_in = StandIn()
        if machine.DRY:
            interpreter.mend()
        cache.open_carried()

    def launches(self) -> Counter[str]:
        return self.stand_in.launches() if self.stand_in else Counter()

    def row(self, name: str, measure: Any, known: Known) -> dict[str, Any]:
        """The row; whatever goes wrong is its status."""
        before = self.launches()
        try:
            status, figures = "ok", measure(known)
        except machine.Skip as reason:
            status, figures = "skipped", {"message": str(reason)}
        except torch.cuda.OutOfMemoryError as error:
            status, figures = "out of memory", {"message": str(error).splitlines()[0][:300]}
        except Exception as error:  # whatever it is: one row's failure must not take the others along
            status, figures = "error", {"message": f"{type(error).__name__}: {error}"[:1000]}
            figures["traceback"] = traceback.format_exc()[-3000:]
        figures = without_nan(figures)
        if machine.LAUNCHED_ONLY:
            figures = without_measurements(figures) | {"launched": dict(self.launches() - before)}
            status = "launched" if status == "ok" else status
        return {"name": name, "status": status, **figures}

    def rows(self, request: dict[str, Any]) -> None:
        from benchmarks.gpu.rows import CEILINGS, groups

        known = Known(request["seconds"], request["ceilings"], request["rows"])
        some = groups()[request["group"]]
        for name in request["names"]:
            self.say(begin=name)
            row = self.row(name, some[name], known)
            self.say(row=row)
            if name == CEILINGS:
                known.ceilings.update({key: x for key, x in row.items() if isinstance(x, float)})
            known.rows.append(row)
            if any(sign in row.get("message", "") for sign in BROKEN):
                self.say(restart=True)
                return
            gc.collect()
            if machine.ON_GPU:
                torch.cuda.empty_cache()
        self.say(done=cache.counted())


def without_measurements(figures: dict[str, Any]) -> dict[str, Any]:
    """What is true of a row whose kernels did not run: sizes and words, no time, error or share."""
    return {key: x for key, x in figures.items() if x is not None and not set(TIMES) & set(key.split("_"))}


def without_nan(figures: Any) -> Any:
    """JSON has no number that is not finite: None in its place."""
    if isinstance(figures, dict):
        return {key: without_nan(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def main() -> int:
    worker, request = Worker(int(sys.argv[1])), json.loads(sys.stdin.readline())
    warnings.filterwarnings("ignore", "Failed to initialize NumPy|divide by zero")
    torch.manual_seed(0)
    if machine.ON_GPU and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: --dry runs on the CPU")
    worker.set_up()
    worker.say(machine=machine.description())
    if request["stage"] == "smoke":
        from benchmarks.gpu import smoke

        smoke.run(worker, request["built"])
    else:
        worker.rows(request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
