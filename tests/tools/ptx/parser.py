"""The text of a kernel in PTX as instructions."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.tools.ptx.hazards import Fault


class Instruction(NamedTuple):
    predicate: str | None  # register that says which threads take part
    negated: bool
    op: str
    args: list[str]
    text: str


class Program(NamedTuple):
    """parameters: name and bits of each. registers: the type of each class. labels: the instruction after each."""

    name: str
    threads: int
    parameters: list[tuple[str, int]]
    registers: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """The only kernel of a PTX module."""
    head, body = ptx[ptx.index(".entry") :].split("{", 1)
    body = body[: body.index("\n}")]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        while (label := re.match(r"([\w$]+):\s*", line)) is not None:
            labels[label[1]] = len(instructions)
            line = line[label.end() :]
        for text in map(str.strip, line.split(";")):
            if not text or text.startswith("."):
                continue
            found = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", text)
            if found is None:
                raise Fault(f"not an instruction: {text!r}")
            op = found[3].replace(".shared::cta", ".shared")  # the same space, as Triton 3.8 spells it
            instructions.append(Instruction(found[2], bool(found[1]), op, operands(found[4]), text))
    return Program(
        name=re.search(r"\.entry\s+(\w+)", head)[1],
        threads=int(re.search(r"\.reqntid\s+(\d+)", head)[1]),
        parameters=[
            (name, int(bits))
            for bits, name in re.findall(r"\.param\s+\.[a-z](\d+)\s+(?:\.ptr[^,\n]*?\s)?(\w+_param_\d+)", head)
        ],
        registers={prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<\d+>", body)},
        instructions=instructions,
        labels=labels,
    )


def operands(text: str) -> list[str]:
    """Split at the commas that are in no braces and no brackets."""
    out, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            out.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return [*out, rest] if rest else out


def members(text: str) -> list[str]:
    """The operands in braces, or the only one."""
    return [part.strip() for part in text.strip("{} \t").split(",")]
