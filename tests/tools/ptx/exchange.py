"""Instructions that threads meet in: barriers, fences, and those that pass registers within a warp."""

from __future__ import annotations

import numpy as np

from tests.tools.ptx.hazards import Fault
from tests.tools.ptx.memory import SharedMemory
from tests.tools.ptx.registers import TYPES, Registers, Step, not_modelled

EVERY_LANE = 0xFFFFFFFF


class Exchange(Registers):
    shared: SharedMemory

    def met(self, step: Step) -> Step:
        """The threads of a warp meet, then each executes the step."""

        def both() -> None:
            self.shared.races.meet_in_warps()
            step()

        return both

    def op_bar(self, parts: list[str], args: list[str]) -> Step:
        if parts[1] == "warp":
            return lambda: self.shared.races.meet_in_warps()
        if args != ["0"] or parts[1] != "sync":
            raise not_modelled(parts)
        return lambda: self.shared.races.meet()

    op_barrier = op_bar

    def op_fence(self, parts: list[str], args: list[str]) -> Step:
        if parts[1] != "proxy":
            raise not_modelled(parts)

        def fence() -> None:
            self.shared.fence = self.shared.races.number

        return fence

    def op_shfl(self, parts: list[str], args: list[str]) -> Step:
        """Each thread reads the register of another lane."""
        mode = parts[2]
        if int(args[3], 0) != 31 or int(args[4], 0) & EVERY_LANE != EVERY_LANE or mode not in ("bfly", "idx"):
            raise not_modelled(parts)
        lane, first = self.thread % 32, self.thread // 32 * 32

        def shuffled(value: np.ndarray, by: np.ndarray) -> np.ndarray:
            other = (lane ^ by.astype(int)) if mode == "bfly" else by.astype(int)
            return value[first + (other & 31)]

        return self.met(self.apply(shuffled, self.target(args[0]), [self.source(arg, 32) for arg in args[1:3]]))

    def op_redux(self, parts: list[str], args: list[str]) -> Step:
        """The sum or extreme of a warp's registers."""
        kind, function = TYPES[parts[-1]], {"min": np.min, "max": np.max, "add": np.sum}[parts[2]]

        def reduced(value: np.ndarray, mask: np.ndarray) -> np.ndarray:
            if (mask != EVERY_LANE).any():
                raise Fault("redux over a part of a warp is not modelled")
            out = function(value.view(kind).reshape(-1, 32), axis=1).astype(kind)
            return np.repeat(out, 32).view(np.uint32)

        return self.met(self.apply(reduced, self.target(args[0]), [self.source(arg, 32) for arg in args[1:3]]))

    def op_vote(self, parts: list[str], args: list[str]) -> Step:
        if parts[2] not in ("any", "all"):
            raise not_modelled(parts)
        function = np.any if parts[2] == "any" else np.all
        return self.met(
            self.apply(
                lambda votes: np.repeat(function(votes.reshape(-1, 32), axis=1), 32),
                self.target(args[0]),
                [self.target(args[1])],
            )
        )
