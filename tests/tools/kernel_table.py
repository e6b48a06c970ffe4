"""What the compiler makes of each kernel, as a table: `python -m tests.tools.kernel_table 90 128`.

Of NVIDIA parts (a compute capability): registers, programs a multiprocessor, shared memory, spilled bytes, and what one
trip of the loop over tiles executes where no mask is needed; of Hopper also milliseconds expected. Of AMD parts
("gfx942"): registers and what is spilled. `--into FILE` writes the table of the installed Triton between its markers in
the file, which DESIGN.md has for two. `--before FILE` compares with what was printed earlier: "before > now".

Expected are 65,536 rows that all meet, on 132 multiprocessors at 1.7 GHz. Four units of a multiprocessor take cycles
for a tile: instructions of warps (4 a cycle), special functions (16), the matrix unit (4,096 operations in half
precision), and the second-level cache (25 bytes, an assumption). Programs on one multiprocessor overlap, and the first
three units of one program do not. So a tile takes the slowest unit, or the sum of the three over the programs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
import triton

from hpcloss.backends.triton import configs
from tests.tools import offline
from tests.tools.machine_code import trip

# The part, width and calls of the tables in DESIGN.md.
IN_DESIGN = (90, 128)
CALLS_IN_DESIGN = (
    "lse", "lse, online", "mean", "mean, uniform", "cross-entropy", "cross-entropy, weights", "lse backward",
    "lse backward, anchors", "lse backward, keys", "mean backward", "mean backward, uniform", "mean backward, weights",
    "cross-entropy backward", "cross-entropy backward, weights", "cross-entropy backward, keys",
)  # fmt: skip
# Of a multiprocessor, by compute capability: threads, programs, and bytes of shared memory, of which a program takes
# RESERVED besides its own (not on Turing).
THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
PROGRAMS = {75: 16, 80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED = {75: 65536, 80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
RESERVED, REGISTERS = 1024, 65536
# Of a multiprocessor of Hopper, for each cycle.
WARP_INSTRUCTIONS, SPECIAL, OPERATIONS, CACHE_BYTES = 4, 16, 4096, 25
ROWS, MULTIPROCESSORS, CLOCK = 65536, 132, 1.7e9
TITLES = (
    "call", "tile", "registers", "programs", "shared KB", "spilled B", "instructions", "special", "matrix",
    "copies of 4/8/16 B", "barriers", "barriers a region", "loops", "expected ms",
)  # fmt: skip
TITLES_OF_AMD = (
    "call", "tile", "vector registers", "of them accumulation", "scalar registers", "spilled vector/scalar",
    "scratch B", "shared KB", "matrix",
)  # fmt: skip


def programs(made: offline.Compiled, capability: int, num_warps: int) -> int:
    """How many programs a multiprocessor holds at once."""
    registers_of_a_warp = -(-made.registers // 8) * 8 * 32
    shared = made.shared_bytes + (RESERVED if capability != 75 else 0)
    return min(
        REGISTERS // registers_of_a_warp // num_warps,
        THREADS[capability] // (32 * num_warps),
        PROGRAMS[capability],
        SHARED[capability] // shared if shared else PROGRAMS[capability],
    )


def expected(made: offline.Compiled, launch: offline.Launch, resident: int, trip: dict[str, object]) -> float:
    """Milliseconds of 65,536 rows, as the head of this file says."""
    warps = launch.options["num_warps"]
    rows, columns, channels = (launch.constants[name] for name in ("BLOCK_I", "BLOCK_J", "BLOCK_D"))
    # A backward pass multiplies twice, but for the part of the scale's gradient alone.
    gradients = dict(zip(launch.kernel.arg_names, launch.args)).get("gradients")
    products = 1 + (gradients is not None and gradients.rows is not None)
    units = (
        trip["instructions"] * warps / WARP_INSTRUCTIONS,
        trip["special"] * 32 * warps / SPECIAL,
        products * 2 * rows * columns * channels / OPERATIONS,
    )
    cycles = max(*units, sum(units) / resident, 2 * columns * channels / CACHE_BYTES)
    return 1e3 * ROWS**2 / (rows * columns) / MULTIPROCESSORS * cycles / CLOCK


def tile(launch: offline.Launch) -> str:
    """Rows x columns, warps and stages."""
    shape = [str(launch.constants[name]) for name in ("BLOCK_I", "BLOCK_J") if name in launch.constants]
    return ", ".join(["x".join(shape), *(str(value) for value in launch.options.values())])


def rows(part: str, dim: int, dtype: torch.dtype, calls: list[str], tiles: configs.Config | None = None) -> list[str]:
    """A line for each kernel with a loop over tiles that these calls launch."""
    lines = []
    for name in calls:
        with offline.recorded(0 if part in offline.AMD else int(part), tiles) as launches:
            offline.calls(dim, dtype)[name]()
        for launch in launches:
            if "BLOCK_J" not in launch.constants:
                continue
            cells = [name, tile(launch)]
            if part in offline.AMD:
                of_amd = offline.compile_for_amd(launch, part)
                vectors, accumulation, scalars, *spilled, scratch, shared, matrix = of_amd
                cells += [vectors, accumulation, scalars, "/".join(map(str, spilled)), scratch, shared // 1024, matrix]
            else:
                made = offline.compile_for(launch, int(part))
                resident, found = programs(made, int(part), launch.options["num_warps"]), trip(made.code)
                cells += [made.registers, resident, f"{made.shared_bytes / 1024:.0f}", made.spilled_bytes]
                cells += found.values()
                if part == "90" and dtype != torch.float32 and "BLOCK_I" in launch.constants:
                    cells.append(f"{expected(made, launch, resident, found):.1f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def compared(lines: list[str], before: str) -> list[str]:
    """The lines with "earlier > now" where a cell has changed; of calls that one of the two has twice, as they come."""
    earlier: dict[str, list[str]] = {}
    for line in before.splitlines():
        if line.startswith("| "):
            earlier.setdefault(line.split("|")[1].strip(), []).append(line)
    result = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        old = earlier.get(cells[0], [])
        was = [cell.strip() for cell in old.pop(0).strip("| ").split("|")] if old else cells
        was += [""] * (len(cells) - len(was))
        both = [now if then == now else f"{then} > {now}".strip() for then, now in zip(was, cells)]
        result.append("| " + " | ".join(both) + " |")
    return result


def head(part: str) -> list[str]:
    titles = TITLES_OF_AMD if part in offline.AMD else TITLES if part == "90" else TITLES[:-1]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def markers(part: str, dim: int, dtype: str) -> tuple[str, str]:
    version = ".".join(triton.__version__.split(".")[:2])
    return f"<!-- kernels: Triton {version}, {part}, {dim} channels, {dtype} -->", "<!-- end of kernels -->"


def between(text: str, part: str, dim: int, dtype: str) -> re.Match[str] | None:
    """The table of the installed Triton in a text, as group 1."""
    first, last = map(re.escape, markers(part, dim, dtype))
    return re.search(f"{first}\n(.*?){last}", text, re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", help='a compute capability such as 90, or "gfx90a" or "gfx942"')
    parser.add_argument("dim", type=int)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--calls", help="those with this in their name; by default all that have a loop over tiles")
    parser.add_argument("--tiles", help="block_i,block_j,num_warps,num_stages instead of the shipped shapes")
    parser.add_argument("--before", type=Path, help="a table printed earlier, to compare with")
    parser.add_argument("--into", type=Path, help="replace the table of this part, width and Triton in a file")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    tiles = configs.Config(*map(int, given.tiles.split(","))) if given.tiles else None
    names = [name for name in offline.calls(given.dim, dtype) if (given.calls or "") in name]
    if given.into:
        names = list(CALLS_IN_DESIGN)
    lines = rows(given.part, given.dim, dtype, names, tiles)
    if given.before:
        lines = compared(lines, given.before.read_text())
    table = "\n".join([*head(given.part), *lines]) + "\n"
    if given.into is None:
        print(f"Triton {triton.__version__}, {given.part}, {given.dim} channels, {given.dtype}\n\n{table}", end="")
        return
    text = given.into.read_text()
    found = between(text, given.part, given.dim, given.dtype)
    if found is None:
        raise SystemExit(f"{given.into} has no line {markers(given.part, given.dim, given.dtype)[0]}")
    given.into.write_text(text[: found.start(1)] + table + text[found.end(1) :])


if __name__ == "__main__":
    main()
