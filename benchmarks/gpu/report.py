"""The document of a run, gpu.json, and the same for people, gpu.txt."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

HEADS = ("forward", "backward", "both ms", "share", "peak MB", "err loss", "err grad")
LADDER = ("supcon", "eager supcon", "compiled supcon", "infonce", "linear_cross_entropy")
COMPETITORS = ("eager", "compiled", "linear", "block loop")  # whose running out of memory is a result


def new(command: str) -> dict[str, Any]:
    return {
        "schema": 2, "command": command, "date": time.strftime("%Y-%m-%d"), "ceilings": {}, "rows": [], "kernels": {},
    }  # fmt: skip


def write(document: dict[str, Any], folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    (folder / "gpu.txt").write_text(table(document) + "\n")


def correct(document: dict[str, Any]) -> bool:
    """Whether everything that ran was right. What had no time, or cannot run here, is reported and no failure."""
    rows = all(
        row["status"] in ("ok", "launched", "skipped", "left out")
        or (row["status"] == "out of memory" and row["name"].startswith(COMPETITORS))
        for row in document["rows"]
    )
    stages = [document[name] for name in ("tests", "sanitizer") if name in document]
    return rows and all(stage["status"] != "failed" for stage in stages)


def number(value: Any, form: str = ".3g", factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, form)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    forms = {"forward_ms": ".4g", "backward_ms": ".4g", "ms": ".4g", "share": ".3f", "peak_bytes": ".1f",
             "error_value": ".1e", "error_gradient": ".1e"}  # fmt: skip
    numbers = [number(row.get(key), form, 1e-6 if key == "peak_bytes" else 1.0) for key, form in forms.items()]
    text = f"{row['name']:<41}" + "".join(f"{x:>10}" for x in numbers)
    for bar in row.get("bars", ()):
        text += f"  {'met' if bar['met'] else 'MISSED'} {bar['ratio']:g} ({bar['bar']})"
    if "times_ours" in row and not row.get("bars"):
        text += f"  {row['times_ours']:.2f} times ours"
    if "message" in row:
        text = f"{text.rstrip()}  {row['status']}: {row['message'].splitlines()[0][:160]}"
    return text.rstrip()


def of_smoke(row: dict[str, Any]) -> str:
    """One line of the smoke test; its seconds are from the start."""
    text = f"{row['name']:<41}{row['status']:>10}"
    if "seconds" in row:
        text += f"{row['seconds']:>8.1f} s"
    if "errors" in row:
        text += f"  relative errors {max(row['errors']):.1e}, at most {row['allowed_error']:g}"
    return text + (f"  {row['message'].splitlines()[0][:160]}" if "message" in row else "")


def of_stage(stage: dict[str, Any]) -> str:
    """One line of the tests or of the sanitizer."""
    counts = [
        f"{stage[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "skipped", "not_run") if key in stage
    ]
    seconds = [f"{stage['seconds']:.0f} s"] if "seconds" in stage else []
    return ", ".join([stage["status"], *counts, *seconds, *filter(None, [stage.get("message")])])


def loud(document: dict[str, Any]) -> list[str]:
    """What nobody may miss: that nothing was measured, that the native library is not there, what had no time."""
    lines = []
    if notice := document.get("machine", {}).get("notice"):
        lines.append(f"NO MEASUREMENT: {notice}")
    if (cache := document.get("cache")) and not carried_fits(cache, document.get("machine", {})):
        lines.append(f"THE CARRIED KERNELS ARE FOR ANOTHER MACHINE: {json.dumps(cache)}")
    if document.get("native", {}).get("status") == "skipped":
        lines.append(document["native"]["message"])
    if late := [row["name"] for row in document["rows"] if row["status"] == "left out"]:
        lines.append(f"LEFT OUT, no time: {len(late)} rows: {', '.join(late)}")
    return lines


def carried_fits(cache: dict[str, Any], machine: dict[str, Any]) -> bool:
    """Whether the cache was prepared for this Triton and this part. Of its ptxas the count of kernels tells."""
    capability = machine.get("capability")
    return cache["triton"] == machine.get("versions", {}).get("triton") and (
        capability is None or cache["capability"] == 10 * capability[0] + capability[1]
    )


def table(document: dict[str, Any]) -> str:
    """Everything for people: the machine, the stages, ceilings, rows, and time and memory against N."""
    lines = loud(document)
    lines += [
        f"{key}: {json.dumps(document[key])}"
        for key in ("machine", "ceilings", "cache", "kernels")
        if document.get(key)
    ]
    if smoke := document.get("smoke"):
        lines += ["", "smoke", *(of_smoke(row) for row in smoke)]
    for name in ("tests", "sanitizer"):
        if stage := document.get(name):
            lines += ["", f"{name}: {of_stage(stage)}"]
            lines += [f"  failed: {test}"[:160] for test in stage.get("failures", ())[:15]]
            lines += [f"  skipped: {count} x {reason}"[:160] for reason, count in stage.get("skips", {}).items()]
    lines += ["", f"{'':<41}" + "".join(f"{head:>10}" for head in HEADS), *(line(row) for row in document["rows"])]
    return "\n".join([*lines, "", *against_n(document["rows"])])


def against_n(rows: list[dict[str, Any]]) -> list[str]:
    cells = {}
    for row in rows:
        method, _, n = row["name"].rpartition(" ")
        if method in LADDER and n.isdigit():
            known = f"{number(row.get('ms'))} ({number(row.get('peak_bytes'), '.0f', 1e-6)})"
            cells[method, int(n)] = known if row["status"] == "ok" else row["status"]
    lines = ["milliseconds of a step, half precision (peak MB)"]
    lines.append(f"{'N':>7}" + "".join(f"{method:>22}" for method in LADDER))
    sizes = sorted({n for _, n in cells})
    return lines + [f"{n:>7}" + "".join(f"{cells.get((method, n), ''):>22}" for method in LADDER) for n in sizes]
