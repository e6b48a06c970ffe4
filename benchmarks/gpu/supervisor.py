"""The stages, one after the other, each in child processes with time limits."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import (
    GPU,
    INTERPRETER,
    MACHINE,
    PREPARE,
    STAND_IN,
    cache,
    library,
    limits,
    report,
    sanitizer,
    tests,
)
from benchmarks.gpu.processes import Child, Ended, TimeIsUp

STAGES = ("smoke", "tests", "sanitizer")  # beside the rows
NOT_BUILT = {"status": "missing", "message": "no device to build the native library for"}
FINE = ("ok", "launched", "skipped", "left out")


class Supervisor:
    """What was found so far, and where it is written."""

    def __init__(self, arguments: argparse.Namespace, machine: str) -> None:
        self.arguments, self.out = arguments, arguments.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.kind = machine.partition(":")[0]
        self.began = time.monotonic()
        self.log = self.out / "children.log"
        self.log.write_text("")
        self.worker = [sys.executable, "-m", "benchmarks.gpu.worker"]
        self.environment: dict[str, str | None] = {
            MACHINE: machine, "TRITON_INTERPRET": "1" if self.kind == INTERPRETER else None,
        }  # fmt: skip
        self.document = report.new(" ".join(["python -m benchmarks.gpu", *sys.argv[1:]]))

    # ---------------------------------------------------------------------------------------------- time and words

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def left(self, until: float) -> float:
        """Seconds until a moment of this run."""
        return until - self.seconds()

    def say(self, text: str) -> None:
        print(f"[{self.seconds():6.1f} s] {text}", flush=True)

    def write(self) -> None:
        self.document["seconds"] = round(self.seconds(), 1)
        report.write(self.document, self.out)

    # ------------------------------------------------------------------------------------------------------ stages

    def run(self) -> int:
        """All stages that are wanted; 0 if everything that ran was right."""
        with tempfile.TemporaryDirectory() as scratch:
            self.prepare(Path(scratch))
            only = self.arguments.only
            wanted = {stage for stage in STAGES if not only or any(part in stage for part in only)}
            wanted |= {"smoke"} if self.kind == GPU else set()  # it builds the native library
            ends = limits.ends(self.arguments.limit, "tests" in wanted, "sanitizer" in wanted)
            self.document["ends"] = ends._asdict()
            if "smoke" in wanted and not self.smoke(ends.smoke, Path(scratch)):
                self.say("the smoke test failed: nothing else is run")
                self.write()
                return 1
            self.rows(ends.bars)
            for name, stage, end in (("tests", tests.run, ends.tests), ("sanitizer", sanitizer.run, ends.sanitizer)):
                if name in wanted:
                    self.stage(name, stage, end)
            self.write()
        self.say("done")
        print(report.table(self.document), flush=True)
        return 0 if report.correct(self.document) else 1

    def prepare(self, scratch: Path) -> None:
        """What children find: the stand-in, a carried cache, an empty cache where none must be used."""
        if self.kind in (STAND_IN, PREPARE):
            from benchmarks.gpu import stand_in

            self.environment |= stand_in.environment(scratch / "driver")
        if self.arguments.cache:
            self.document["cache"] = cache.unpack(self.arguments.cache, scratch / "cache")
            self.environment |= {"TRITON_CACHE_DIR": str(scratch / "cache"), cache.CARRIED: "1"}

    def smoke(self, until: float, scratch: Path) -> bool:
        """Whether every step was right."""
        self.document["smoke"] = rows = []
        build = library.Build(scratch / "libhpcloss.so") if self.kind == GPU else None
        child = Child(self.worker, self.log, self.environment)
        current, problem = "start", None
        try:
            built = build.result(self.left(until)) if build else NOT_BUILT
            child.ask({"stage": "smoke", "built": built})
            while True:
                answer = child.next(self.left(until))
                current = answer.get("begin", current)
                if "machine" in answer:
                    self.document["machine"] = answer["machine"]
                if "row" in answer:
                    rows.append(answer["row"])
                    self.say(report.of_smoke(answer["row"]))
                if "done" in answer:
                    self.document["kernels"]["smoke"] = answer["done"]
                    break
        except TimeIsUp:
            problem = f"no result within {until:.0f} s"
        except Ended as how:
            if not rows or rows[-1]["status"] in FINE:
                problem = f"its process ended: {how}"
        finally:
            child.end()
        if problem:
            log = self.log.read_text(errors="replace")[-3000:]
            rows.append({"name": current, "status": "error", "message": problem, "traceback": log})
        for row in rows:
            if row["status"] not in FINE:
                print(row.get("traceback", ""), row["message"], sep="\n", flush=True)
        if native := next((row for row in rows if row["name"] == "native library"), None):
            self.document["native"] = native
            if "library" in native:
                self.environment["HPCLOSS_LIBRARY"] = native["library"]
        self.write()
        return all(row["status"] in FINE for row in rows)

    def stage(self, name: str, run: Any, until: float) -> None:
        """Tests or sanitizer, or that there was no time for them."""
        if self.left(until) < 3 * limits.FEWEST:
            self.document[name] = {"status": "left out", "message": f"no time: {self.left(until):.0f} s are left"}
        else:
            self.document[name] = run(self.kind, self.out, lambda: self.left(until), self.environment)
        self.say(f"{name}: {report.of_stage(self.document[name])}")
        self.write()

    # -------------------------------------------------------------------------------------------------------- rows

    def rows(self, until: float) -> None:
        """The ceilings always, which others are compared with."""
        from benchmarks.gpu.rows import CEILINGS, groups

        only = self.arguments.only or [""]
        wanted = {
            group: [name for name in rows if any(part in name for part in only)] for group, rows in groups().items()
        }
        if any(wanted.values()) and CEILINGS not in wanted["bars"]:
            wanted["bars"].insert(0, CEILINGS)
        for group, names in wanted.items():
            if names:
                self.group(group, names, until)

    def group(self, group: str, names: list[str], until: float) -> None:
        """The rows, in as many processes as it takes: a row that breaks or hangs its process is given up."""
        left, died = list(names), 0
        while left:
            if self.left(until) < limits.FEWEST:
                return self.give_up(left, "left out", f"no time: rows end {until:.0f} s after the start")
            before = len(left)
            self.child(group, left, until)
            died = died + 1 if len(left) == before else 0
            if died == 2:  # a process that never comes to its first row
                self.give_up(left, "error", f"its process does not start: see {self.log.name}")
                left = []

    def give_up(self, names: list[str], status: str, message: str) -> None:
        for name in names:
            self.add(name, status, message)

    def child(self, group: str, left: list[str], until: float) -> None:
        """One process over the rows that are left; removes those that it has settled."""
        known = {
            "seconds": 0.25 if self.arguments.quick else 0.5, "ceilings": self.document["ceilings"],
            "rows": self.document["rows"],
        }  # fmt: skip
        request = {"stage": "rows", "group": group, "names": left, **known}
        child = Child(self.worker, self.log, self.environment)
        child.ask(request)
        current = None
        try:
            while left:
                answer = child.next(min(self.arguments.row_limit, self.left(until)))
                if "machine" in answer:
                    self.document.setdefault("machine", answer["machine"])
                elif "begin" in answer:
                    current = answer["begin"]
                elif "row" in answer:
                    self.settle(answer["row"], left)
                    current = None
                elif "restart" in answer:
                    return
            self.document["kernels"][group] = child.next(10.0).get("done")
        except TimeIsUp:
            if not left:
                return
            name, message = current or left[0], f"no result within {self.arguments.row_limit:.0f} s"
            status = "error"
            if self.left(until) <= 0:
                status, message = "left out", "no time: it was stopped at the end of the rows' time"
            self.settle({"name": name, "status": status, "message": message}, left)
        except Ended as how:
            if current is not None:
                self.settle({"name": current, "status": "error", "message": f"its process ended: {how}"}, left)
        finally:
            child.end()

    def settle(self, row: dict[str, Any], left: list[str]) -> None:
        left.remove(row["name"])
        self.add(row.pop("name"), row.pop("status"), **row)

    def add(self, name: str, status: str, message: str | None = None, **figures: Any) -> None:
        row = {"name": name, "status": status, **figures} | ({"message": message} if message else {})
        if name == "ceilings" and status == "ok":
            self.document["ceilings"] = {key: x for key, x in figures.items() if isinstance(x, float)}
        self.document["rows"].append(row)
        self.write()
        self.say(report.line(row))


def main(arguments: argparse.Namespace) -> int:
    machine = GPU
    if arguments.dry:
        machine = INTERPRETER
    elif arguments.stand_in:
        machine = f"{PREPARE if arguments.full_size else STAND_IN}:{arguments.stand_in}"
    os.environ[MACHINE] = machine  # before anything of the rows is imported here
    if arguments.list:
        from benchmarks.gpu.rows import groups

        print("\n".join([*STAGES, *(name for rows in groups().values() for name in rows)]))
        return 0
    return Supervisor(arguments, machine).run()
