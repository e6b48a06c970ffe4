"""Compile the kernels of all rows on a machine without a GPU: `python -m benchmarks.gpu.prepare --capability 90`.

The rows and the smoke test are gone through in their full sizes on a stand-in for the driver, so that Triton's own
launch path asks for each kernel. What loading needs is copied to `--out`, a folder for `python -m benchmarks.gpu
--cache`. Then everything is launched again from that copy alone: exit status 0 says that nothing was compiled the
second time.

It must be run with the version of Triton of the machine that will run, and with the ptxas that Triton has there. Not
carried: the launchers in C, one for each signature, which hold the interface of one Python version.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu import MACHINE, PREPARE, __main__, cache

MOST_BYTES = 40 * 2**20
SECONDS = 3600.0


def launched(capability: int, folder: Path, *options: str) -> dict[str, Any]:
    """The document of one pass over smoke test and rows."""
    from benchmarks.gpu import supervisor

    arguments = __main__.parsed(
        ["--out", str(folder), "--limit", str(SECONDS), "--row-limit", "600", "--quick", *options]
    )
    run = supervisor.Supervisor(arguments, os.environ[MACHINE])
    if run.run():
        raise SystemExit(f"not everything was launched: see {folder}")
    return run.document


def kernels(document: dict[str, Any]) -> Counter[str]:
    """Compiled and loaded kernels of all child processes."""
    total: Counter[str] = Counter()
    for counts in document["kernels"].values():
        total.update(counts)
    return total


def launchers(folder: Path) -> int:
    """Modules in C that Triton built: a launcher for each signature, and what talks to the driver."""
    return len(list(folder.glob("*/*.so")))


def ptxas(capability: int) -> str:
    from triton.backends.nvidia import compiler

    path = compiler.get_ptxas(capability).path
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+ (\S+)", said)[1]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, required=True, help="of the GPU that will run, such as 90")
    parser.add_argument("--out", type=Path, default=Path("gpu-cache"), help="folder of the kernels")
    parser.add_argument("--only", action="append", help="rows and stages whose name holds this")
    arguments = parser.parse_args(given)
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already")
    os.environ[MACHINE] = f"{PREPARE}:{arguments.capability}"  # before anything of the rows is imported
    only = [word for part in arguments.only or () for word in ("--only", part)]
    with tempfile.TemporaryDirectory() as scratch:
        full, began = Path(scratch, "full"), time.monotonic()
        os.environ |= {"TRITON_CACHE_DIR": str(full), cache.CARRIED: "1"}
        first = kernels(launched(arguments.capability, Path(scratch, "first"), *only))
        manifest = {
            "triton": metadata.version("triton"), "capability": arguments.capability,
            "ptxas": ptxas(arguments.capability), "prepared with Python": platform.python_version(),
            "kernels": first["compiled"], "launchers not carried": launchers(full),
        }  # fmt: skip
        size = cache.pack(full, arguments.out, manifest)
        before, middle = sum(path.stat().st_size for path in full.rglob("*") if path.is_file()), time.monotonic()
        os.environ["TRITON_CACHE_DIR"] = str(Path(scratch, "none"))  # the second pass has the copy alone
        again = kernels(launched(arguments.capability, Path(scratch, "second"), "--cache", str(arguments.out), *only))
    print(
        f"{manifest}\nprepared in {middle - began:.0f} s, {before / 2**20:.1f} MB, of which {size / 2**20:.1f} MB are"
        f" carried; launched again in {time.monotonic() - middle:.0f} s: {again['compiled']} kernels compiled,"
        f" {again['loaded']} loaded, {again['launchers']} launchers built in {again['launcher_seconds']:.0f} s"
    )
    if size > MOST_BYTES:
        print(f"more than {MOST_BYTES / 2**20:.0f} MB")
    return int(again["compiled"] > 0 or not again["loaded"] or size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
