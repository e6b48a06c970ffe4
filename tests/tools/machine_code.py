"""The machine code of a compiled kernel: its loops, and what the shortest way through the loop over tiles executes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NO_RESULT = ("LDGSTS", "R2UR", "BAR", "WARPSYNC")  # whose first operand may be a register that they read
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


class Instruction(NamedTuple):
    predicate: str  # such as "@!P0"; empty where all threads take part
    op: str
    operands: str


class Loop(NamedTuple):
    """Numbers of its instructions: the first, which every trip executes, all of them, and those that go back to it."""

    start: int
    body: frozenset[int]
    ends: frozenset[int]


def disassembled(cubin: bytes) -> tuple[str, str]:
    """What the disassembler says of the use of registers and stack, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, code


class MachineCode:
    """The instructions of a kernel as the disassembler prints them, and where each goes on."""

    def __init__(self, text: str) -> None:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*);", text)
        self.instructions = [Instruction(predicate, op, operands) for _, predicate, op, operands in lines]
        places = {int(address, 16): number for number, (address, *_) in enumerate(lines)}
        self.next = [self._next(number, places) for number in range(len(lines))]
        self.loops = self._loops()

    def _next(self, number: int, places: dict[int, int]) -> list[int]:
        predicate, op, operands = self.instructions[number]
        name, following = op.split(".")[0], [number + 1] if number + 1 < len(self.instructions) else []
        if name in ("EXIT", "RET"):
            return following if predicate else []
        if name != "BRA":
            return following
        target = places[int(operands.split("0x")[-1].split()[0].rstrip(")"), 16)]
        # Besides the predicate in front, a second one may stand before the address.
        always = not predicate and operands.strip().startswith(("0x", "`"))
        return [target] if always else [target, *following]

    def _reached(self, start: int, without: int | None, within: frozenset[int] | None = None) -> list[int]:
        """What comes after an instruction on any way that avoids another one; each before those that lead to it."""
        order, seen, stack = [], {start}, [(start, iter(self.next[start]))]
        while stack:
            number, following = stack[-1]
            to = next(following, None)
            if to is None:
                order.append(number)
                stack.pop()
            elif to not in seen and to != without and (within is None or to in within):
                seen.add(to)
                stack.append((to, iter(self.next[to])))
        return order

    def _loops(self) -> list[Loop]:
        """One for each instruction that another one goes back to, which cannot be reached without it."""
        before: dict[int, list[int]] = {}
        for number, following in enumerate(self.next):
            for to in following:
                before.setdefault(to, []).append(number)
        loops = []
        for start in sorted({to for number, following in enumerate(self.next) for to in following if to < number}):
            others = set(self._reached(0, without=start)) if start else set()
            ends = {number for number in before[start] if number > start and number not in others}
            body, waiting = {start}, list(ends)
            while waiting:
                number = waiting.pop()
                if number not in body:
                    body.add(number)
                    waiting += before.get(number, [])
            if ends:
                loops.append(Loop(start, frozenset(body), frozenset(ends)))
        return loops

    def count(self, numbers: object, name: str) -> int:
        """How many of the instructions with these numbers have an op that starts so."""
        return sum(self.instructions[number].op.split(".")[0] == name for number in numbers)

    def work(self, numbers: object) -> int:
        """Products: of the matrix units, or where nothing is given to them multiply-adds."""
        return sum(self.count(numbers, name) for name in MATRIX) or self.count(numbers, "FFMA")

    def tile_loop(self) -> Loop | None:
        """Of the loops with products and without another such loop in them, the one with the most."""
        loops = [loop for loop in self.loops if self.work(loop.body)]
        inner = [loop for loop in loops if not any(other.body < loop.body for other in loops)]
        return max(inner, key=lambda loop: self.work(loop.body), default=None)

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop with another one in it."""
        return min((other for other in self.loops if other.body > loop.body), key=lambda o: len(o.body), default=None)

    def shortest_trip(self, loop: Loop) -> list[int]:
        """The instructions of the trip with all products that executes the fewest: one without a mask."""
        best: dict[int, tuple[int, int, int]] = {}  # products and instructions (negative) to the end, and the next one
        for number in self._reached(loop.start, without=loop.start, within=loop.body):
            products = self.work([number])
            ways = [
                (best[to][0] + products, best[to][1] - 1, to)
                for to in self.next[number]
                if to in best and number not in loop.ends
            ]
            best[number] = max(ways, default=(products if number in loop.ends else -(10**9), -1, -1))
        path, at = [], loop.start
        while at >= 0:
            path.append(at)
            at = best[at][2]
        return path

    def overwritten(self) -> list[str]:
        """Instructions that write a register from which a running product of a warpgroup may still read its rows.

        Read from top to bottom: a product runs until the next wait.
        """
        found, read = [], set()
        for _, op, operands in self.instructions:
            name, first = op.split(".")[0], re.match(r"R(\d+)", operands)
            if name == "HGMMA":
                rows = re.match(r"R(\d+)", operands.split(",")[1].strip())
                read |= {int(rows[1]) + k for k in range(4)} if rows else set()
            elif op.startswith("WARPGROUP.DEPBAR"):
                read = set()
            elif first and name not in NO_RESULT:
                width = 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
                if read & {int(first[1]) + k for k in range(width)}:
                    found.append(f"{op} {operands}")
        return found


def trip(code: MachineCode) -> dict[str, object]:
    """What one trip of the loop over tiles executes, without a mask; barriers of the loop around it, a region's."""
    loop = code.tile_loop()
    if loop is None:
        return {}
    path, region = code.shortest_trip(loop), code.around(loop)
    inner = frozenset().union(*(other.body for other in code.loops if region and other.body < region.body))
    copies = Counter(
        next((part for part in code.instructions[number].op.split(".") if part in ("64", "128")), "32")
        for number in path
        if code.instructions[number].op.startswith("LDGSTS")
    )
    return {
        "instructions": len(path),
        "special": code.count(path, "MUFU"),
        "matrix": sum(code.count(path, name) for name in MATRIX),
        "copies": "/".join(str(copies[width]) for width in ("32", "64", "128")),
        "barriers": code.count(path, "BAR"),
        "barriers a region": code.count(region.body - inner, "BAR") if region else 0,
        "loops": len(code.loops),
    }
