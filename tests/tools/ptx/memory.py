"""Global memory, the tensors of a launch behind made-up addresses, and the shared memory of a program.

Memory that nobody wrote holds POISON: the tests fill new tensors with it. An asynchronous copy reads its source when it
is issued and arrives at its wait.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tests.tools.ptx.hazards import Fault, Hazards, Races

RAW = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # what registers and memory hold, by bits
POISON = {2: 0x7FED, 4: 0x7FED7FED, 8: 0x7FED7FED7FED7FED}  # by bytes: a NaN of fp16, bf16 and fp32
SHARED_BASE = 1024  # the address where shared memory starts
SHIFT = 36  # of the number of a buffer in a global address


class Buffer:
    """The bytes of a tensor."""

    def __init__(self, number: int, name: str, tensor: torch.Tensor) -> None:
        self.name, self.floating = name, tensor.is_floating_point()
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        flat = torch.as_strided(tensor.detach(), (size,), (1,), tensor.storage_offset())
        self.bytes = flat.view(torch.uint8).numpy() if size else np.zeros(0, np.uint8)
        self.base = (number << SHIFT) + (tensor.data_ptr() & 0xFF)  # as far from a multiple of 256 as it is
        self.writer = np.full((len(self.bytes) + 1) // 2, -1)  # the program that wrote each two bytes

    def is_same(self, other: Buffer) -> bool:
        return len(self.bytes) == len(other.bytes) and self.bytes.ctypes.data == other.bytes.ctypes.data


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self, hazards: Hazards) -> None:
        self.hazards = hazards
        self.buffers: list[Buffer] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor. One that is there already shares the record of who wrote it."""
        buffer = Buffer(len(self.buffers) + 1, name, tensor)
        for other in self.buffers:
            if buffer.is_same(other):
                buffer.writer = other.writer
        self.buffers.append(buffer)
        return buffer.base

    def load(self, address: np.ndarray, lanes: np.ndarray, width: int, count: int) -> np.ndarray:
        """Words [lanes, count] of `width` bytes."""
        out = np.empty((len(lanes), count), RAW[8 * width])
        for buffer, here, offset in self._parts(address, lanes, width * count):
            got = buffer.bytes[offset[:, None] + np.arange(width * count)].view(RAW[8 * width])
            if buffer.floating and width in POISON and (bad := got == RAW[8 * width](POISON[width])).any():
                where = f"{buffer.name} at byte {offset[bad.any(1)][0]}"
                self.hazards.note("read of global memory nobody wrote", where)
            writer = buffer.writer[(offset // 2)[:, None] + np.arange(max(width * count // 2, 1))]
            if ((writer >= 0) & (writer != self.hazards.program)).any():
                self.hazards.note("read of what another program wrote", buffer.name)
            out[here] = got
        return out

    def store(self, address: np.ndarray, lanes: np.ndarray, width: int, values: np.ndarray) -> None:
        size = width * values.shape[1]
        for buffer, here, offset in self._parts(address, lanes, size):
            new = np.ascontiguousarray(values[here]).view(np.uint8)
            at = offset[:, None] + np.arange(size)
            halves = (offset // 2)[:, None] + np.arange(max(size // 2, 1))
            writer = buffer.writer[halves]
            if ((writer >= 0) & (writer != self.hazards.program)).any() and (buffer.bytes[at] != new).any():
                self.hazards.note("two programs write different values", buffer.name)
            buffer.bytes[at] = new
            if (buffer.bytes[at] != new).any():
                self.hazards.note("two threads write different values in one instruction", buffer.name)
            buffer.writer[halves] = self.hazards.program

    def _parts(
        self, address: np.ndarray, lanes: np.ndarray, size: int
    ) -> Iterator[tuple[Buffer, np.ndarray, np.ndarray]]:
        """Each buffer that is meant, the positions of its addresses, and their bytes in it."""
        numbers = (address >> np.uint64(SHIFT)).astype(int)
        for number in numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            if not 1 <= number <= len(self.buffers):
                raise Fault(f"address {int(address[here[0]]):#x} of no tensor, program {self.hazards.program}")
            buffer = self.buffers[number - 1]
            offset = address[here].astype(np.int64) - buffer.base
            outside = (offset < 0) | (offset + size > len(buffer.bytes))
            if outside.any():
                first = np.flatnonzero(outside)[0]
                raise Fault(
                    f"{size} bytes at {offset[first]} of {buffer.name}, out of bounds, which are {len(buffer.bytes)}: "
                    f"program {self.hazards.program}, thread {lanes[here[first]]}"
                )
            if (odd := address[here] % np.uint64(size) != 0).any():
                raise Fault(f"misaligned: {size} bytes of {buffer.name} at {offset[odd][0]}")
            yield buffer, here, offset


class SharedMemory:
    """Of a program that starts: all of it poison. granule: bytes that races are told apart by."""

    def __init__(self, size: int, granule: int, hazards: Hazards) -> None:
        self.size, self.granule, self.hazards = (size + 15) // 16 * 16, granule, hazards
        self.bytes = np.full(self.size, 0xFF, np.uint8)
        self.races = Races(self.size // granule, granule, hazards)
        self.copies: list = []  # not committed
        self.groups: list = []
        self.fence = -1  # the number of the last write that matrix instructions are sure to see

    def granules(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [lanes] and granules [lanes, n] of `size` bytes at each address."""
        offset = address.astype(np.int64) - SHARED_BASE
        if len(offset) and (offset.min() < 0 or offset.max() + size > self.size):
            raise Fault(f"bytes {offset.min()} to {offset.max() + size} of shared memory, which has {self.size}")
        if (odd := offset % size != 0).any():
            raise Fault(f"misaligned: {size} bytes of shared memory at {offset[odd][0]}")
        return offset, (offset // self.granule)[:, None] + np.arange(size // self.granule)

    def words(self, offset: np.ndarray, width: int, count: int) -> np.ndarray:
        """[lanes, count], unchecked."""
        return self.bytes.view(RAW[8 * width])[(offset // width)[:, None] + np.arange(count)]

    def load(self, address: np.ndarray, lanes: np.ndarray, width: int, count: int) -> np.ndarray:
        offset, at = self.granules(address, width * count)
        self.races.reads(at, lanes, lanes // 32)
        return self.words(offset, width, count)

    def store(self, address: np.ndarray, lanes: np.ndarray, width: int, values: np.ndarray) -> None:
        new = np.ascontiguousarray(values).view(np.uint8)
        offset, at = self.granules(address, new.shape[1])
        self.races.writes(at, lanes, lanes // 32, self.put(offset, new))

    def put(self, offset: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Write bytes [lanes, size]; whether each granule [lanes, n] had other values."""
        at = offset[:, None] + np.arange(new.shape[1])
        changed = (self.bytes[at] != new).reshape(len(offset), -1, self.granule).any(2)
        self.bytes[at] = new
        if (self.bytes[at] != new).any():
            self.hazards.note("WAW in one instruction", "two threads write different values")
        return changed

    # -------------------------------------------------------------------------------------- asynchronous copies

    def copy(self, address: np.ndarray, lanes: np.ndarray, new: np.ndarray) -> None:
        """Bytes [lanes, size] are on their way."""
        offset, at = self.granules(address, new.shape[1])
        self.races.writes(at, lanes, lanes // 32, np.ones(at.shape, bool))
        np.add.at(self.races.flying, at, 1)
        self.copies.append((offset, at, lanes, new))

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, left: int) -> None:
        """Until no more than `left` groups are on their way."""
        while len(self.groups) > left:
            for offset, at, lanes, new in self.groups.pop(0):
                self.put(offset, new)
                np.subtract.at(self.races.flying, at, 1)
                self.races.landed(at, lanes[:, None], copied=True)
