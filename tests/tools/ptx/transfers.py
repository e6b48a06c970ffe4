"""Instructions that move data: parameters, loads, stores, asynchronous copies."""

from __future__ import annotations

import numpy as np

from tests.tools.ptx.hazards import Fault
from tests.tools.ptx.memory import RAW, GlobalMemory, SharedMemory
from tests.tools.ptx.parser import members
from tests.tools.ptx.registers import SIGNED, TYPES, Registers, Step, bits_of, not_modelled


def widened(words: np.ndarray, kind: str, register: int) -> np.ndarray:
    """Words of a type, in a register of `register` bits: a load into a wider one extends the sign, or zeros."""
    if register == bits_of(kind):
        return words
    return words.view(TYPES[kind]).astype(SIGNED[register] if kind[0] == "s" else RAW[register]).view(RAW[register])


class Transfers(Registers):
    memory: GlobalMemory
    shared: SharedMemory  # of the program that runs

    def load_parameter(self, parts: list[str], args: list[str]) -> Step:
        name = args[1].strip("[] ")
        if dict(self.program.parameters).get(name) != bits_of(parts[-1]):
            raise not_modelled(parts)
        register = bits_of(self.kind(args[0]))
        return self.apply(
            lambda value: widened(value, parts[-1], register), self.target(args[0]), [self.set_at_start(name)]
        )

    def transfer(self, parts: list[str], args: list[str], predicate: str | None, negated: bool) -> Step:
        """A load or store of up to four words of each thread that takes part."""
        space = next((part for part in parts[1:] if part in ("global", "shared")), None)
        if space is None or {"volatile", "acquire", "release", "relaxed"} & set(parts):
            raise not_modelled(parts)
        width, lanes, values = bits_of(parts[-1]) // 8, self.lanes(predicate, negated), self.values
        of, at = (args[0], args[1]) if parts[0] == "ld" else (args[1], args[0])
        base, plus = self.address(at, 64 if space == "global" else 32)

        def memory() -> GlobalMemory | SharedMemory:
            return self.memory if space == "global" else self.shared

        if parts[0] == "st":
            sources = [self.source(name, max(8 * width, 16)) for name in members(of)]

            def store() -> None:
                active = lanes()
                if len(active):
                    words = np.stack([values[source][active].astype(RAW[8 * width]) for source in sources], 1)
                    memory().store((values[base] + plus)[active], active, width, words)

            return store
        count = len(members(of))
        targets = [
            (place, self.target(name), bits_of(self.kind(name)))
            for place, name in enumerate(members(of))
            if name != "_"
        ]

        def load() -> None:
            active = lanes()
            if not len(active):
                return
            got = memory().load((values[base] + plus)[active], active, width, count)
            for place, target, bits in targets:
                word = np.ascontiguousarray(got[:, place])
                new = values[target].copy()
                new[active] = widened(word, parts[-1], bits)
                values[target] = new

        return load

    def asynchronous_copy(self, parts: list[str], args: list[str], predicate: str | None, negated: bool) -> Step:
        """cp.async: threads copy from global to shared memory and go on."""
        if "commit_group" in parts:
            return lambda: self.shared.commit()
        if "wait_group" in parts:
            left = int(args[0])
            return lambda: self.shared.wait(left)
        if parts[2] not in ("ca", "cg"):
            raise not_modelled(parts)
        (to, to_plus), (of, of_plus) = self.address(args[0], 32), self.address(args[1], 64)
        size = int(args[2], 0)
        given = self.source(args[3], 32) if len(args) > 3 else self.constant(size, 32)
        lanes, values = self.lanes(predicate, negated), self.values

        def copy() -> None:
            active = lanes()
            if not len(active):
                return
            read = values[given][active]
            if not ((read == 0) | (read == size)).all():
                raise Fault(f"cp.async of {read.max()} of {size} bytes is not modelled")
            new = np.zeros((len(active), size), np.uint8)
            if len(full := np.flatnonzero(read)):
                address = (values[of] + of_plus)[active[full]]
                new[full] = self.memory.load(address, active[full], 4, size // 4).view(np.uint8)
            self.shared.copy((values[to] + to_plus)[active], active, new)

        return copy
