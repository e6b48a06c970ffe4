"""Systematic mistakes in a kernel's PTX, one at a time."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Mistake(NamedTuple):
    kind: str
    line: int  # of the PTX, from 0
    text: str  # of that line, as it is now

    def __str__(self) -> str:
        return f"{self.kind}, line {self.line}: {self.text.strip()}"

    def planted(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line] = self.text
        return "\n".join(lines)


def _dropped(line: str) -> str:
    return ""


def _later(line: str) -> str:
    """A wait that leaves one more group on its way."""
    return re.sub(r"(wait_group\S*\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", line)


def _swapped_registers(line: str) -> str:
    """Of a product of warps: the first two registers of A."""
    groups = list(re.finditer(r"\{([^}]*)\}", line))
    names = [name.strip() for name in groups[1][1].split(",")]
    names[0], names[1] = names[1], names[0]
    return f"{line[: groups[1].start(1)]} {', '.join(names)} {line[groups[1].end(1) :]}"


def _swapped_descriptors(line: str) -> str:
    """Of a product of warpgroups: A and B, both in shared memory."""
    return re.sub(r"(%rd\d+)\s*,\s*(%rd\d+)", r"\2, \1", line, count=1)


def _exchanged(pairs: dict[str, str]) -> Callable[[str], str]:
    both = pairs | {new: old for old, new in pairs.items()}
    return lambda line: re.sub("|".join(map(re.escape, both)), lambda found: both[found[0]], line, count=1)


def _negated(line: str) -> str:
    return re.sub(r"@(!?)(%p\d+)", lambda found: f"@{'' if found[1] else '!'}{found[2]}", line, count=1)


def _for_all(line: str) -> str:
    return re.sub(r"@!?%p\d+\s*", "", line, count=1)


def _other_integer(line: str) -> str:
    return re.sub(r"(,\s*)(-?\d+)(\s*;)", lambda found: f"{found[1]}{int(found[2]) + 1}{found[3]}", line, count=1)


def _other_offset(line: str) -> str:
    """Of an address: 16 bytes on."""
    return re.sub(r"\[(%r\w+)(?:\s*\+\s*(-?\d+))?\s*\]", lambda f: f"[{f[1]} + {int(f[2] or 0) + 16}]", line, count=1)


def _other_float(line: str) -> str:
    """A constant of fp32 is 1 % larger; 0 is 1."""

    def larger(found: re.Match[str]) -> str:
        value = struct.unpack(">f", bytes.fromhex(found[1]))[0]
        return "0f" + struct.pack(">f", value * 1.01 or 1.0).hex().upper()

    return re.sub(r"0f([0-9A-Fa-f]{8})", larger, line, count=1)


# Kind, what its lines match, and how it changes them.
KINDS: list[tuple[str, str, Callable[[str], str]]] = [
    ("barrier left out", r"\bbar\.sync\b", _dropped),
    ("barrier of a warp left out", r"\bbar\.warp\.sync\b", _dropped),
    ("fence left out", r"\bfence\.proxy\b", _dropped),
    ("wait left out", r"\bcp\.async\.wait_group\b|\bwgmma\.wait_group\b", _dropped),
    ("wait that leaves one more group", r"\bcp\.async\.wait_group\b|\bwgmma\.wait_group\b", _later),
    ("copy left out", r"\bcp\.async\.c[ag]\b", _dropped),
    ("store to shared memory left out", r"\bst\.shared\b|\bstmatrix\b", _dropped),
    ("store left out", r"\bst\.global\b", _dropped),
    ("address 16 bytes on", r"\b(?:ldmatrix|ld\.shared|st\.shared|cp\.async\.c[ag])\b.*\[", _other_offset),
    ("registers of a product swapped", r"\bmma\.sync\b", _swapped_registers),
    ("operands of a product swapped", r"\bwgmma\.mma_async\b.*%rd\d+\s*,\s*%rd\d+", _swapped_descriptors),
    ("branch negated", r"@!?%p\d+\s+bra\b", _negated),
    ("predicate negated", r"@!?%p\d+\s+(?!bra)", _negated),
    ("predicate left out", r"@!?%p\d+\s+(?!bra)", _for_all),
    ("bound off by one", r"\bsetp\.(?:lt|le|gt|ge)\.[su]32\b",
     _exchanged({".lt.": ".le.", ".gt.": ".ge."})),
    ("comparison turned round", r"\bsetp\.(?:lt|le|gt|ge|eq|ne)\.",
     _exchanged({".lt.": ".ge.", ".gt.": ".le.", ".eq.": ".ne."})),
    ("smallest for largest", r"\b(?:min|max)\.", _exchanged({"min.": "max."})),
    ("sum for difference", r"\b(?:add|sub)(?:\.rn)?\.f32\b", _exchanged({"add": "sub"})),
    ("choice turned round", r"\bselp\.", lambda line: re.sub(
        r"(%\w+|0f\w+|-?\d+)(\s*,\s*)(%\w+|0f\w+|-?\d+)(\s*,\s*%p\d+)", r"\3\2\1\4", line, count=1)),
    ("integer constant one more", r"\b(?:add|mad|shl|shr|and|mul)\S*[su]?\d*\s.*,\s*-?\d+\s*;", _other_integer),
    ("constant 1 % larger", r"\b(?:add|sub|mul|fma|max|min)\S*\.f32\b.*0f", _other_float),
]  # fmt: skip


def mistakes(ptx: str, of_a_kind: int) -> Iterator[Mistake]:
    """Some of each kind, spread evenly over the lines where it can be made."""
    lines = ptx.split("\n")
    body = next(number for number, line in enumerate(lines) if line.strip() == "{")
    for kind, pattern, change in KINDS:
        places = [n for n in range(body, len(lines)) if re.search(pattern, lines[n].split("//")[0])]
        places = [n for n in places if change(lines[n]) != lines[n]]
        chosen = {places[k * len(places) // of_a_kind] for k in range(of_a_kind)} if places else ()
        for number in sorted(chosen):
            yield Mistake(kind, number, change(lines[number]))
