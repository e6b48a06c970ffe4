"""What a kernel must not do: faults, which end it, and hazards, which are noted; and the races of shared memory.

Races are of granules of 1, 2 or 4 bytes. An epoch of the program ends at bar.sync, one of a warp at any instruction
that its threads meet in. A race is a read of what another warp wrote in this epoch (RAW), or a write of another value
over what another warp read (WAR) or wrote (WAW) in it; and the same between threads of a warp in its epoch.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

NOBODY, SEVERAL = -1, -2  # in place of the number of a thread or warp


class Fault(Exception):
    """What ends a kernel on a GPU, or what is not modelled."""


class Hazards:
    """How often each kind of hazard was seen at each instruction, and what the first of them was."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}
        self.program, self.instruction = 0, ""  # what runs now

    def note(self, kind: str, detail: str) -> None:
        key = (kind, self.instruction)
        self.counts[key] += 1
        self.examples.setdefault(key, f"program {self.program}: {detail}")

    def __str__(self) -> str:
        return "\n".join(f"{kind} at `{at}`: {self.examples[kind, at]}" for kind, at in self.counts)


class Races:
    """Who last wrote and read each granule, and when."""

    def __init__(self, granules: int, size: int, hazards: Hazards) -> None:
        self.size, self.hazards = size, hazards
        self.epoch = self.warp_epoch = 0
        self.number = 0  # of writes so far
        self.writer, self.written, self.written_in_warp, self.write = (np.full(granules, NOBODY) for _ in range(4))
        self.reader, self.reading_warp, self.read, self.read_in_warp = (np.full(granules, NOBODY) for _ in range(4))
        self.flying = np.zeros(granules, int)  # asynchronous copies to it
        self.watched = np.zeros(granules, int)  # running matrix instructions that read it
        self.copied = np.zeros(granules, bool)  # whether an asynchronous copy wrote it last

    def meet(self) -> None:
        """All threads of the program."""
        self.epoch += 1
        self.meet_in_warps()

    def meet_in_warps(self) -> None:
        self.warp_epoch += 1

    def reads(self, at: np.ndarray, thread: np.ndarray, warp: np.ndarray, together: bool = False) -> None:
        """Granules [lanes, n] are read by threads [lanes] of warps [lanes]; together: by the warp as one."""
        thread, warp = thread[:, None], warp[:, None]
        writer = self.writer[at]
        self._note("read of shared memory nobody wrote", at, writer == NOBODY)
        self._note("read under a running cp.async", at, self.flying[at] > 0)
        others = (writer != NOBODY) & (writer // 32 != warp) & (self.written[at] == self.epoch)
        self._note("RAW", at, others)
        if not together:
            same_warp = (writer != NOBODY) & (writer // 32 == warp) & (writer != thread)
            self._note("RAW in a warp", at, same_warp & (self.written_in_warp[at] == self.warp_epoch))
        now, now_in_warp = self.read[at] == self.epoch, self.read_in_warp[at] == self.warp_epoch
        before = np.where(now, self.reading_warp[at], warp), np.where(now & now_in_warp, self.reader[at], thread)
        self.reading_warp[at], self.reader[at] = warp, thread
        # A granule that several read, in this instruction or since the epoch began, has no single reader.
        for readers, new, old in ((self.reading_warp, warp, before[0]), (self.reader, thread, before[1])):
            readers[at[(readers[at] != new) | (old != new)]] = SEVERAL
        self.read[at], self.read_in_warp[at] = self.epoch, self.warp_epoch

    def writes(
        self, at: np.ndarray, thread: np.ndarray, warp: np.ndarray, changed: np.ndarray, together: bool = False
    ) -> None:
        """Granules [lanes, n] are written; changed [lanes, n]: whether with another value than is there."""
        thread, warp = thread[:, None], warp[:, None]
        self._note("write under a running cp.async", at, self.flying[at] > 0)
        self._note("write under a running wgmma", at, self.watched[at] > 0)
        now, reading_warp = self.read[at] == self.epoch, self.reading_warp[at]
        self._note("WAR", at, now & (reading_warp != warp) & changed)
        if not together:
            other = (reading_warp == warp) & (self.read_in_warp[at] == self.warp_epoch) & (self.reader[at] != thread)
            self._note("WAR in a warp", at, now & other & changed)
        writer = self.writer[at]
        others = (writer != NOBODY) & (writer // 32 != warp) & (self.written[at] == self.epoch)
        self._note("WAW", at, others & changed)
        self.landed(at, thread, copied=False)

    def landed(self, at: np.ndarray, thread: np.ndarray, copied: bool) -> None:
        """The bytes are there from now on."""
        self.number += 1
        self.copied[at], self.writer[at], self.write[at] = copied, thread, self.number
        self.written[at], self.written_in_warp[at] = self.epoch, self.warp_epoch

    def _note(self, kind: str, at: np.ndarray, bad: np.ndarray) -> None:
        if bad.any():
            first = at[bad][0]
            writer, reader = self.writer[first], self.reading_warp[first]
            self.hazards.note(kind, f"byte {first * self.size}, written by thread {writer}, read by warp {reader}")
