"""Matrix instructions: of warps (ldmatrix, stmatrix, mma) and of warpgroups (wgmma), with products in float64.

A tf32 operand is an fp32 register without its low 13 bits. The accumulators of a running wgmma hold FLYING.
"""

from __future__ import annotations

import re

import numpy as np

from tests.tools.ptx.arithmetic import f32, widen
from tests.tools.ptx.exchange import Exchange
from tests.tools.ptx.hazards import Fault
from tests.tools.ptx.memory import SHARED_BASE
from tests.tools.ptx.parser import members
from tests.tools.ptx.registers import Step, not_modelled

U32 = np.uint32
FLYING = 0xFFC0BAD2  # a NaN
WARPGROUP = 128  # threads
GROUP = 1000  # added to the number of a warpgroup, to tell it from a warp as a reader


def tf32(bits: np.ndarray) -> np.ndarray:
    return f32(bits & U32(0xFFFFE000))


class Running:
    """The products of wgmma that nobody has waited for: accumulators, and granules that are read."""

    def __init__(self) -> None:
        self.issued: list = []  # not committed
        self.groups: list = []
        self.accumulators: dict[int, np.ndarray] = {}


class Matrices(Exchange):
    running: Running  # of the program that runs

    # ------------------------------------------------------------------------------------------------- of warps

    def matrix_rows(self, base: int, plus: np.generic, count: int) -> tuple[np.ndarray, ...]:
        """Rows of `count` 8 x 8 matrices of each warp, at addresses of its first lanes: bytes, granules, readers."""
        warps = self.threads // 32
        address = (self.values[base] + plus).reshape(warps, 32)[:, : 8 * count].reshape(-1)
        offset, at = self.shared.granules(address, 16)
        warp = np.repeat(np.arange(warps), 8 * count)
        return offset, at, 32 * warp, warp

    def op_ldmatrix(self, parts: list[str], args: list[str]) -> Step:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise not_modelled(parts)
        count, transposed, values = int(parts[4][1:]), "trans" in parts, self.values
        targets = [self.target(name) for name in members(args[0])]
        base, plus = self.address(args[1], 32)

        def load() -> None:
            offset, at, thread, warp = self.matrix_rows(base, plus, count)
            self.shared.races.reads(at, thread, warp, together=True)
            got = self.shared.words(offset, 2, 8).reshape(-1, count, 8, 8)
            for number, target in enumerate(targets):
                matrix = got[:, number].transpose(0, 2, 1) if transposed else got[:, number]
                values[target] = np.ascontiguousarray(matrix).view(U32).reshape(-1)

        return self.met(load)

    def op_stmatrix(self, parts: list[str], args: list[str]) -> Step:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise not_modelled(parts)
        count, transposed, values = int(parts[4][1:]), "trans" in parts, self.values
        sources = [self.target(name) for name in members(args[1])]
        base, plus = self.address(args[0], 32)

        def store() -> None:
            offset, at, thread, warp = self.matrix_rows(base, plus, count)
            matrices = [values[source].view(np.uint16).reshape(-1, 8, 8) for source in sources]
            new = np.stack([m.transpose(0, 2, 1) if transposed else m for m in matrices], 1).reshape(-1, 8)
            changed = self.shared.put(offset, np.ascontiguousarray(new).view(np.uint8))
            self.shared.races.writes(at, thread, warp, changed, together=True)

        return self.met(store)

    def fragment(self, registers: list[int], kind: str) -> np.ndarray:
        """[warps, rows, k] in float64: the 16 rows of A from four registers, the 8 columns of B from two."""
        warps, values = self.threads // 32, self.values
        if kind == "tf32":
            pieces = [tf32(values[k]).reshape(warps, 8, 4) for k in registers]
        else:
            pieces = [widen(values[k].view(np.uint16), kind).reshape(warps, 8, 8) for k in registers]
        if len(pieces) == 4:
            pieces = [np.concatenate([pieces[0], pieces[1]], 1), np.concatenate([pieces[2], pieces[3]], 1)]
        return np.concatenate(pieces, 2).astype(np.float64)

    def op_mma(self, parts: list[str], args: list[str]) -> Step:
        kind = parts[7]
        if (parts[3], kind) not in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")):
            raise not_modelled(parts)
        if parts[4:7] != ["row", "col", "f32"] or parts[8:] != [kind, "f32"]:
            raise not_modelled(parts)
        values = self.values
        d, a, b, c = ([self.source(name, 32) for name in members(group)] for group in args)

        def multiply() -> None:
            product = self.fragment(a, kind) @ self.fragment(b, kind).transpose(0, 2, 1)  # [warps, 16, 8]
            product = product.reshape(-1, 2, 8, 4, 2)
            new = [
                (product[:, number // 2, :, :, number % 2].reshape(-1) + f32(values[c[number]])).astype(np.float32)
                for number in range(4)
            ]
            for target, value in zip(d, new):
                values[target] = value.view(U32)

        return self.met(multiply)

    # -------------------------------------------------------------------------------------------- of warpgroups

    def op_wgmma(self, parts: list[str], args: list[str]) -> Step:
        if parts[1] == "fence":
            return lambda: None
        if parts[1] == "commit_group":
            return lambda: self.commit_products()
        if parts[1] == "wait_group":
            left = int(args[0])
            return lambda: self.wait_for_products(left)
        kind = parts[6]
        rows, n, k = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", parts[4]).groups())
        if parts[1] != "mma_async" or rows != 64 or kind not in ("f16", "bf16", "tf32"):
            raise not_modelled(parts)
        if parts[5] != "f32" or parts[7] != kind or args[4:6] != ["1", "1"]:
            raise not_modelled(parts)
        values = self.values
        d = [self.target(name) for name in members(args[0])]
        in_registers = args[1].startswith("{")
        a = [self.target(name) for name in members(args[1])] if in_registers else self.source(args[1], 64)
        b, scale = self.source(args[2], 64), self.source(args[3], 1)
        # The last operands of 16-bit types: whether A, where it is in memory, and B are stored along their other axis.
        transposed = [flag == "1" for flag in args[6:]] if kind != "tf32" else [False, False]

        def multiply() -> None:
            reads: list = []
            if in_registers:
                left = self.fragment(a, kind).reshape(-1, 64, k)
            else:
                left = self.of_descriptor(values[a], 64, k, kind, transposed[0], reads)
            right = self.of_descriptor(values[b], n, k, kind, transposed[-1], reads)
            if (values[scale] != values[scale][0]).any():
                raise Fault("scale-d differs between threads")
            out = left @ right.transpose(0, 2, 1)  # [warpgroups, 64, n]
            out = out.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, self.threads)
            if values[scale][0]:
                out = out + f32(np.stack([self.running.accumulators.get(target, values[target]) for target in d]))
            for target, value in zip(d, out.astype(np.float32).view(U32)):
                self.running.accumulators[target] = value
                values[target] = np.full(self.threads, FLYING, U32)
            self.running.issued.append((reads, d))

        return multiply

    def of_descriptor(
        self, descriptors: np.ndarray, count: int, k: int, kind: str, transposed: bool, reads: list
    ) -> np.ndarray:
        """[warpgroups, count, k] in float64 of each group's shared memory; what is read is added to `reads`."""
        out, size, shared, races = [], 4 if kind == "tf32" else 2, self.shared, self.shared.races
        for group, words in enumerate(descriptors.reshape(-1, WARPGROUP)):
            if (words != words[0]).any():
                raise Fault("a descriptor differs between the threads of a warpgroup")
            offset = _addresses(int(words[0]), count, k, size, transposed) - SHARED_BASE
            if offset.min() < 0 or offset.max() + size > shared.size:
                raise Fault(f"wgmma reads bytes {offset.min()} to {offset.max() + size} of {shared.size}")
            granules = np.unique(offset // shared.granule)[:, None]
            reader = np.full(len(granules), GROUP + group)
            late = races.write[granules] > shared.fence
            for copied, how in ((True, "cp.async"), (False, "st.shared")):
                if (bad := late & (races.copied[granules] == copied)).any():
                    shared.hazards.note(
                        f"wgmma over {how} without fence.proxy.async", f"byte {granules[bad][0] * shared.granule}"
                    )
            races.reads(granules, reader, reader, together=True)
            races.watched[granules] += 1
            reads.append((granules, reader))
            got = shared.words(offset.reshape(-1), size, 1).reshape(count, k)
            out.append(tf32(got) if kind == "tf32" else widen(got, kind))
        return np.stack(out).astype(np.float64)

    def commit_products(self) -> None:
        self.running.groups.append(self.running.issued)
        self.running.issued = []

    def wait_for_products(self, left: int) -> None:
        """Until no more than `left` groups of products run."""
        running, races = self.running, self.shared.races
        while len(running.groups) > left:
            finished = running.groups.pop(0)
            others = {target for group in [*running.groups, running.issued] for _, d in group for target in d}
            for reads, d in finished:
                for granules, reader in reads:
                    races.watched[granules] -= 1
                    # It may have read until now.
                    races.reading_warp[granules] = races.reader[granules] = reader[:, None]
                    races.read[granules], races.read_in_warp[granules] = races.epoch, races.warp_epoch
                for target in d:
                    if target in running.accumulators and target not in others:
                        self.values[target] = running.accumulators.pop(target)


def _addresses(descriptor: int, count: int, k: int, size: int, transposed: bool) -> np.ndarray:
    """Addresses [count, k] of the entries of a matrix in shared memory, in the swizzled layout of its descriptor."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if swizzle is None or (descriptor >> 49) & 7:
        raise Fault("a descriptor without a swizzle, or with a base offset, is not modelled")
    i, j = np.arange(count)[:, None], np.arange(k)[None, :]
    if transposed:  # `wide` entries along `count` lie next to each other
        wide = swizzle // size
        at = start + (i % wide) * size + (i // wide) * leading + (j % 8) * swizzle + (j // 8) * stride
    else:
        at = start + (i % 8) * swizzle + (i // 8) * stride + j * size
    return at ^ (((at >> 7) & (swizzle // 16 - 1)) << 4)
