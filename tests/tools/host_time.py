"""Host time of a step on a GPU, by stage, through Triton's launch path and the stand-in for a driver.

    python -m tests.tools.host_time            # 256 rows in fp16, over an eager step of 8 rows

The operations of torch run on the CPU here. On a GPU the host queues them instead, which takes about as long for so
few rows. The bars are those of hpcloss/DESIGN.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.tools.launch_path import Machine

BARS = {"supcon": 2.0, "region": 3.0, "region, batch": 3.0}  # times the eager step
ROWS = {"supcon": 256, "region": 128, "region, batch": 128}  # a map of 128 pixels; two of them


def main() -> None:
    """Print a table for each loss."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(90, Path(folder))
        try:
            for name, bar in BARS.items():
                found = machine.ask("host_time", name=name, n=ROWS[name], dtype="float16")
                ratio = found["us"] / found["eager_us"]
                print(
                    f"{name}, {ROWS[name]} rows: {found['us']:.0f} us, {ratio:.2f} times eager (at most {bar}),"
                    f" {found['launches']} launches"
                )
                for stage, share in found["stages"].items():
                    print(f"  {stage:28} {share * found['us']:6.0f} us")
        finally:
            machine.stop()


if __name__ == "__main__":
    main()
