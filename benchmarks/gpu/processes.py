"""Child processes, each with a process group and a session of its own, which ends with all of them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import ROOT


class TimeIsUp(Exception):
    """Nothing came within the time."""


class Ended(Exception):
    """The process has ended; the message says how."""


def end(process: subprocess.Popen[Any]) -> None:
    """Kill the process, its group, and what left the group but is of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            session = int(status.read_text().rpartition(")")[2].split()[3])
            if session == process.pid:
                os.kill(int(status.parent.name), signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the driver, where no signal reaches it
        process.wait(10)


def how(status: int) -> str:
    """In words, with what a process ended."""
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"exit status {status}"


def start(
    command: Sequence[str], environment: Mapping[str, str | None], output: IO[Any], **options: Any
) -> subprocess.Popen[Any]:
    """environment: what differs from this process's; None: a variable that the child does not have."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment}
    whole = {name: value for name, value in whole.items() if value is not None}
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=whole, start_new_session=True, **options
    )


def run(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str | None]) -> int | None:
    """The exit status of a command whose output goes to `log`; None if it was killed after these seconds."""
    with log.open("w") as output:
        process = start(command, environment, output, stdin=subprocess.DEVNULL)
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


class Child:
    """A process that is asked by one line of JSON and answers lines of JSON; what it prints goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str | None]) -> None:
        reading, writing = os.pipe()
        with log.open("a") as output:
            self.process = start(
                [*command, str(writing)], environment, output, stdin=subprocess.PIPE, pass_fds=[writing]
            )
        os.close(writing)
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=[reading], daemon=True).start()

    def ask(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `next` will say
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.close()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # cut off by the end of the process
                    self.answers.put(json.loads(line))
        self.answers.put(None)

    def next(self, seconds: float) -> dict[str, Any]:
        """The next answer. TimeIsUp if there is none within these seconds, Ended if there will be none."""
        try:
            answer = self.answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeIsUp from None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            status = self.process.poll()
            self.end()
            raise Ended("it closed its output" if status is None else how(status))
        return answer

    def end(self) -> None:
        end(self.process)
