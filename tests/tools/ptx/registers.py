"""The registers of all threads of a program, as arrays [threads], and what an operand of an instruction names.

An instruction becomes a function without arguments, made once, which reads and writes registers by number.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.tools.ptx.hazards import Fault
from tests.tools.ptx.memory import RAW, SHARED_BASE
from tests.tools.ptx.parser import Program, members

UNSET = {16: 0x7FED, 32: 0xFFC0BAD1, 64: 0xFFFFBAD1BAD1BAD1}  # by bits: a NaN that a register nobody wrote holds
TYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
SIGNED = {bits: np.dtype(f"int{bits}").type for bits in (8, 16, 32, 64)}

Step = Callable[[], object]


def not_modelled(parts: list[str]) -> Fault:
    return Fault(f"{'.'.join(parts)} is not modelled in this form")


def bits_of(kind: str) -> int:
    return int(re.search(r"\d+", kind)[0])


class Registers:
    """values: of all registers, by number; those of a program until the next one starts."""

    def __init__(self, program: Program) -> None:
        self.program, self.threads = program, program.threads
        self.thread = np.arange(self.threads)
        self.values: list[np.ndarray | None] = []
        self.numbers: dict[str, int] = {}  # of registers by their names
        self.constants: dict[int, np.ndarray] = {}
        self.changing: dict[str, int] = {}  # parameters, and the number of the program

    def reset(self, program: int, parameters: dict[str, np.ndarray]) -> None:
        """Before a program starts: nobody has written anything."""
        for name, number in self.numbers.items():
            kind = self.kind(name)
            if kind == "pred":
                self.values[number] = np.zeros(self.threads, bool)
            else:
                self.values[number] = np.full(self.threads, UNSET[bits_of(kind)], RAW[bits_of(kind)])
        for number, value in self.constants.items():
            self.values[number] = value
        for name, number in self.changing.items():
            self.values[number] = np.full(self.threads, program, np.uint32) if name == "%ctaid.x" else parameters[name]

    def kind(self, name: str) -> str:
        """The type of a register."""
        return self.program.registers[re.match(r"%[a-zA-Z_]+", name)[0]]

    def _new(self) -> int:
        self.values.append(None)
        return len(self.values) - 1

    def target(self, name: str) -> int:
        """The number of a register."""
        if name not in self.numbers:
            self.kind(name)
            self.numbers[name] = self._new()
        return self.numbers[name]

    def constant(self, value: int, bits: int) -> int:
        number = self._new()
        self.constants[number] = np.full(self.threads, value & (2**bits - 1), bool if bits == 1 else RAW[bits])
        return number

    def each(self, values: np.ndarray) -> int:
        """The number of a register that always holds these values [threads]."""
        number = self._new()
        self.constants[number] = values.astype(np.uint32)
        return number

    def set_at_start(self, name: str) -> int:
        if name not in self.changing:
            self.changing[name] = self._new()
        return self.changing[name]

    def source(self, text: str, bits: int) -> int:
        """The number of a register, or of one that holds a constant, a special register or the address of a symbol."""
        if text == "%tid.x":
            return self.each(self.thread)
        if text == "%laneid":
            return self.each(self.thread % 32)
        if text == "%ntid.x":
            return self.constant(self.threads, 32)
        if text in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            return self.constant(0, 32)
        if text == "%ctaid.x":
            return self.set_at_start(text)
        if text.startswith("%"):
            return self.target(text)
        if text[:2] in ("0f", "0d"):
            return self.constant(int(text[2:], 16), {"0f": 32, "0d": 64}[text[:2]])
        if text.startswith("global_smem"):
            return self.constant(SHARED_BASE + int(text.partition("+")[2] or 0), bits)
        return self.constant(int(text, 0), bits)

    def address(self, text: str, bits: int) -> tuple[int, np.generic]:
        """The number of the register and the offset of `[register + offset]`."""
        found = re.match(r"(%?[\w$]+)\s*(?:\+\s*(-?\w+))?$", text.strip("[] \t"))
        if found is None:
            raise Fault(f"not an address: {text!r}")
        return self.source(found[1], bits), RAW[bits](int(found[2] or "0", 0) & (2**bits - 1))

    def lanes(self, predicate: str | None, negated: bool) -> Callable[[], np.ndarray]:
        """A function that gives the numbers of the threads that take part."""
        if predicate is None:
            return lambda: self.thread
        number = self.target(predicate)
        return lambda: np.flatnonzero(self.values[number] != negated)

    def apply(self, function: Callable, target: int, sources: list[int]) -> Step:
        """target = function(sources)."""
        values = self.values

        def step() -> None:
            values[target] = function(*[values[source] for source in sources])

        return step

    def masked(self, step: Step, predicate: str, negated: bool, written: str) -> Step:
        """The same for the threads of a predicate alone."""
        mask, values = self.target(predicate), self.values
        targets = [self.target(name) for name in members(written) if name.startswith("%")]

        def some() -> None:
            before = [values[target] for target in targets]
            step()
            for target, old in zip(targets, before):
                values[target] = np.where(values[mask] != negated, values[target], old)

        return some
