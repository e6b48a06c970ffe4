"""A kernel that runs: its instructions as functions, in blocks between branches, and its programs one after another."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import torch

from tests.tools.ptx.arithmetic import Arithmetic
from tests.tools.ptx.hazards import Fault, Hazards
from tests.tools.ptx.matrices import Matrices, Running
from tests.tools.ptx.memory import RAW, GlobalMemory, SharedMemory
from tests.tools.ptx.parser import Instruction, parse
from tests.tools.ptx.registers import Step, not_modelled
from tests.tools.ptx.transfers import Transfers

BRANCHES = ("bra", "ret", "exit")
# Instructions that whole warps execute.
UNPREDICATED = ("bar", "barrier", "fence", "wgmma", "mma", "ldmatrix", "stmatrix", "shfl", "redux", "vote")


class Block:
    """Instructions that are executed one after another, and where it goes on: to `target` if `predicate` holds."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Step]] = []
        self.predicate: int | None = None
        self.negated = False
        self.target: str | None = None  # a label
        self.branches = self.ends = False


class Kernel(Arithmetic, Transfers, Matrices):
    """A kernel of PTX and the shared memory that its programs have.

    hazards: what was seen in all launches. limit: of blocks of instructions that a program executes; more have no end.
    longest: how many one did.
    """

    limit, longest = 1_000_000, 0

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        super().__init__(parse(ptx))
        self.shared_bytes, self.hazards = shared_bytes, Hazards()
        self.granule = self._granule()
        self.blocks, self.places = self._blocks()

    def launch(self, programs: int, arguments: list[Any], names: list[str] | None = None) -> None:
        """arguments: of the parameters in order. A tensor is read and written in place, a float is fp32; None is a null
        pointer, and so is what is not given."""
        self.memory = GlobalMemory(self.hazards)
        parameters = {}
        for number, (name, bits) in enumerate(self.program.parameters):
            value = arguments[number] if number < len(arguments) else None
            if isinstance(value, torch.Tensor):
                word = self.memory.add(names[number] if names else name, value)
            elif isinstance(value, float):
                word = int.from_bytes(struct.pack("<f", value), "little")
            else:
                word = int(value or 0) & (2**bits - 1)
            parameters[name] = np.full(self.threads, word, RAW[bits])
        with np.errstate(all="ignore"):
            for program in range(programs):
                self.hazards.program = program
                self.shared = SharedMemory(self.shared_bytes, self.granule, self.hazards)
                self.running = Running()
                self.reset(program, parameters)
                self._run()

    def _run(self) -> None:
        at = count = 0
        while at < len(self.blocks):
            block, count = self.blocks[at], count + 1
            self.longest = max(self.longest, count)
            if count > self.limit:
                raise Fault(f"{self.program.name}: no end after {self.limit} blocks of instructions")
            for text, step in block.steps:
                self.hazards.instruction = text
                try:
                    step()
                except Fault as fault:
                    raise Fault(f"{self.program.name}: {fault}: `{text}`") from None
            at += 1
            if block.branches and self._is_taken(block):
                if block.ends:
                    return
                at = self.places[block.target]

    def _is_taken(self, block: Block) -> bool:
        if block.predicate is None:
            return True
        taken = self.values[block.predicate] != block.negated
        if taken.any() != taken.all():
            raise Fault(f"{self.program.name}: threads part at the branch to {block.target}")
        return bool(taken[0])

    # ------------------------------------------------------------------------------------------- preparing

    def _blocks(self) -> tuple[list[Block], dict[str, int]]:
        """The blocks, and which one each label starts."""
        starts = set(self.program.labels.values())
        blocks, places = [Block()], {}
        for number, instruction in enumerate(self.program.instructions):
            if blocks[-1].branches or (number in starts and number > 0):
                blocks.append(Block())
            places |= {label: len(blocks) - 1 for label, at in self.program.labels.items() if at == number}
            if instruction.op.split(".")[0] in BRANCHES:
                self._end(blocks[-1], instruction)
            else:
                blocks[-1].steps.append((instruction.text, self._step(instruction)))
        end = len(self.program.instructions)
        return blocks, places | {label: len(blocks) for label, at in self.program.labels.items() if at == end}

    def _end(self, block: Block, branch: Instruction) -> None:
        block.branches, block.negated = True, branch.negated
        block.predicate = None if branch.predicate is None else self.target(branch.predicate)
        block.ends = not branch.op.startswith("bra")
        block.target = None if block.ends else branch.args[0]

    def _step(self, instruction: Instruction) -> Step:
        predicate, negated, op, args, text = instruction
        parts = op.split(".")
        try:
            if parts[:2] == ["ld", "param"]:
                step = self.load_parameter(parts, args)
            elif parts[0] in ("ld", "st"):
                return self.transfer(parts, args, predicate, negated)
            elif parts[:2] == ["cp", "async"]:
                return self.asynchronous_copy(parts, args, predicate, negated)
            else:
                method = getattr(self, f"op_{parts[0]}", None)
                if method is None or (predicate and parts[0] in UNPREDICATED):
                    raise not_modelled(parts)
                step = method(parts, args)
        except Fault as fault:
            raise Fault(f"{self.program.name}: {fault}: `{text}`") from None
        return step if predicate is None else self.masked(step, predicate, negated, args[0])

    def _granule(self) -> int:
        """The widest piece of shared memory that every access is made of, 4 bytes at most."""
        accesses = [re.match(r"(?:ld|st)\.shared.*\.[busf](\d+)$", i.op) for i in self.program.instructions]
        return min([4, *(int(found[1]) // 8 for found in accesses if found)])
