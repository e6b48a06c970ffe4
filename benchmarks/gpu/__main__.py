"""The acceptance run on one GPU: does it work at all, the machine's ceilings, every row, the GPU tests, the sanitizer.

    python -m benchmarks.gpu --out DIR [--only NAME ...] [--cache FOLDER] [--quick] [--list] [--dry]

from the folder of the sources. Needs torch, triton and pytest, no installation. In this order:

smoke      one step of five losses on each backend against float64, and the native library, which nvcc builds for this
           GPU meanwhile. A failure ends the run at once, with its trace and exit status 1.
rows       ceilings first; of each row first whether it is correct, then its time. A row that hangs or breaks its
           process is recorded, and the next one runs in a fresh process.
tests      pytest over the GPU tests, in several processes; skips are counted by their reason.
sanitizer  compute-sanitizer over small problems, where it is installed.

All of it ends within `--limit` seconds; what had no time is "left out", in the document, and no failure. Exit status 0:
everything that ran was right; a missed speed bar is marked, no failure. Writes DIR/gpu.json and DIR/gpu.txt after each
row, and logs. `--cache`: kernels from `python -m benchmarks.gpu.prepare`. `--dry`: tiny sizes on the CPU in Triton's
interpreter.

F = 2 D x (pairs of the rule with a real anchor); a step is 3F, a forward pass F, a backward pass 2F.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import limits


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--only", action="append", help="rows and stages whose name holds this")
    parser.add_argument("--cache", type=Path, help="compiled kernels, from benchmarks.gpu.prepare")
    parser.add_argument("--list", action="store_true", help="print the names of the stages and rows")
    parser.add_argument("--quick", action="store_true", help="half as many repeats")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--limit", type=float, default=limits.LIMIT, help="seconds of the whole run")
    parser.add_argument("--row-limit", type=float, default=limits.ROW, help="seconds after which a row is given up")
    # For the tests: kernels are launched on a stand-in for the driver of this part, in tiny sizes or full.
    parser.add_argument("--stand-in", type=int, metavar="CAPABILITY", help=argparse.SUPPRESS)
    parser.add_argument("--full-size", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    from benchmarks.gpu import supervisor

    return supervisor.main(parsed())


if __name__ == "__main__":
    sys.exit(main())
