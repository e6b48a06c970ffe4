"""Instructions of each thread for itself: arithmetic, logic, comparisons, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.tools.ptx.memory import RAW
from tests.tools.ptx.parser import members
from tests.tools.ptx.registers import SIGNED, TYPES, Registers, Step, bits_of, not_modelled

U32, U64 = np.uint32, np.uint64
FLOATS = (np.float16, np.float32, np.float64)


def f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """Denormals of fp32 become zero and keep their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 of the bits of "f16" or "bf16"."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return f32(bits.astype(U32) << U32(16))


def narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """Bits of "f16" or "bf16" of fp32, to nearest even."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(np.uint16)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers, towards zero; x / 0 is all ones, as hardware gives."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    whole = np.abs(a) // np.abs(np.where(b == 0, 1, b)) * np.sign(a) * np.sign(b)
    return np.where(b == 0, -1, whole)


# Ordered comparisons are false of NaN, those with a "u" true.
COMPARE_FLOATS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
COMPARE_INTEGERS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
ROUND = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


class Arithmetic(Registers):
    def arithmetic(
        self, parts: list[str], args: list[str], of_floats: Callable | None, of_integers: Callable | None, count: int
    ) -> Step:
        """A function of `count` operands of the instruction's type."""
        pair = parts[-1] == "f32x2"  # two fp32 numbers in 64 bits
        kind = np.float32 if pair else TYPES.get(parts[-1])
        function = of_floats if kind in FLOATS else of_integers
        if kind is None or function is None or len(args) != count + 1:
            raise not_modelled(parts)
        bits = 64 if pair else bits_of(parts[-1])
        flushed, saturated, is_float = "ftz" in parts, "sat" in parts, kind in FLOATS

        def whole(*operands: np.ndarray) -> np.ndarray:
            typed = [operand.view(kind) for operand in operands]
            if flushed:
                typed = [flush(operand) for operand in typed]
            out = function(*typed)
            if saturated and is_float:
                out = np.clip(np.nan_to_num(out, nan=0.0), 0, 1)
            return np.asarray(flush(out) if flushed else out).astype(kind, copy=False).view(RAW[bits])

        return self.apply(whole, self.target(args[0]), [self.source(arg, bits) for arg in args[1:]])

    def op_add(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, np.add, np.add, 2)

    def op_sub(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, np.subtract, np.subtract, 2)

    def op_mul(self, parts: list[str], args: list[str]) -> Step:
        if "wide" in parts:
            return self.wide(parts, args)
        if "hi" in parts:
            if parts[-1] not in ("s32", "u32"):
                raise not_modelled(parts)
            twice = np.int64 if parts[-1] == "s32" else U64
            return self.arithmetic(parts, args, None, lambda a, b: (a.astype(twice) * b) >> twice(32), 2)
        return self.arithmetic(parts, args, np.multiply, np.multiply, 2)

    def op_mad(self, parts: list[str], args: list[str]) -> Step:
        if "wide" in parts:
            return self.wide(parts, args)
        return self.arithmetic(parts, args, fused, lambda a, b, c: a * b + c, 3)

    def wide(self, parts: list[str], args: list[str]) -> Step:
        """The product of two integers in twice their bits, and a sum with a third operand where there is one."""
        kind, bits = TYPES[parts[-1]], bits_of(parts[-1])
        twice = SIGNED[2 * bits] if parts[-1][0] == "s" else RAW[2 * bits]
        sources = [self.source(args[1], bits), self.source(args[2], bits)]
        sources += [self.source(arg, 2 * bits) for arg in args[3:]]

        def product(a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
            return sum(more, (a.view(kind).astype(twice) * b.view(kind)).view(RAW[2 * bits]))

        return self.apply(product, self.target(args[0]), sources)

    def op_fma(self, parts: list[str], args: list[str]) -> Step:
        if parts[-1] not in ("f32", "f32x2"):
            raise not_modelled(parts)
        return self.arithmetic(parts, args, fused, None, 3)

    def op_div(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, np.divide, divided, 2)

    def op_rem(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, None, lambda a, b: a - divided(a, b) * b.astype(np.int64), 2)

    def op_min(self, parts: list[str], args: list[str]) -> Step:
        return self.extreme(parts, args, np.minimum if "NaN" in parts else np.fmin, np.minimum)

    def op_max(self, parts: list[str], args: list[str]) -> Step:
        return self.extreme(parts, args, np.maximum if "NaN" in parts else np.fmax, np.maximum)

    def extreme(self, parts: list[str], args: list[str], of_floats: Callable, of_integers: Callable) -> Step:
        """Of two operands, or of three floating-point ones from sm_100 on."""
        if len(args) == 4:
            return self.arithmetic(parts, args, lambda a, b, c: of_floats(of_floats(a, b), c), None, 3)
        return self.arithmetic(parts, args, of_floats, of_integers, 2)

    def op_neg(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, np.negative, np.negative, 1)

    def op_abs(self, parts: list[str], args: list[str]) -> Step:
        return self.arithmetic(parts, args, np.abs, np.abs, 1)

    def special(self, parts: list[str], args: list[str], function: Callable) -> Step:
        """A special function, rounded from float64 where hardware approximates."""
        return self.arithmetic(parts, args, lambda x: function(x.astype(np.float64)), None, 1)

    def op_ex2(self, parts: list[str], args: list[str]) -> Step:
        return self.special(parts, args, np.exp2)

    def op_lg2(self, parts: list[str], args: list[str]) -> Step:
        return self.special(parts, args, np.log2)

    def op_rcp(self, parts: list[str], args: list[str]) -> Step:
        return self.special(parts, args, np.reciprocal)

    def op_rsqrt(self, parts: list[str], args: list[str]) -> Step:
        return self.special(parts, args, lambda x: 1 / np.sqrt(x))

    def op_sqrt(self, parts: list[str], args: list[str]) -> Step:
        return self.special(parts, args, np.sqrt)

    # ------------------------------------------------------------------------------------------------------ bits

    def logic(self, parts: list[str], args: list[str], function: Callable) -> Step:
        bits = 1 if parts[-1] == "pred" else bits_of(parts[-1])
        return self.apply(function, self.target(args[0]), [self.source(arg, bits) for arg in args[1:]])

    def op_and(self, parts: list[str], args: list[str]) -> Step:
        return self.logic(parts, args, np.bitwise_and)

    def op_or(self, parts: list[str], args: list[str]) -> Step:
        return self.logic(parts, args, np.bitwise_or)

    def op_xor(self, parts: list[str], args: list[str]) -> Step:
        return self.logic(parts, args, np.bitwise_xor)

    def op_not(self, parts: list[str], args: list[str]) -> Step:
        return self.logic(parts, args, np.invert)

    def op_lop3(self, parts: list[str], args: list[str]) -> Step:
        """Any function of three bits, given as its table."""
        table = int(args[4], 0)

        def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            out = np.zeros_like(a)
            for entry in range(8):
                if table >> entry & 1:
                    out |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
            return out

        return self.apply(function, self.target(args[0]), [self.source(arg, 32) for arg in args[1:4]])

    def op_shl(self, parts: list[str], args: list[str]) -> Step:
        bits = bits_of(parts[-1])

        def function(a: np.ndarray, by: np.ndarray) -> np.ndarray:
            return np.where(by < bits, a << np.minimum(by, bits - 1).astype(RAW[bits]), RAW[bits](0))

        return self.apply(function, self.target(args[0]), [self.source(args[1], bits), self.source(args[2], 32)])

    def op_shr(self, parts: list[str], args: list[str]) -> Step:
        kind, bits, signed = TYPES[parts[-1]], bits_of(parts[-1]), parts[-1][0] == "s"

        def function(a: np.ndarray, by: np.ndarray) -> np.ndarray:
            out = a.view(kind) >> np.minimum(by, bits - 1).astype(kind)
            return (out if signed else np.where(by < bits, out, kind(0))).view(RAW[bits])

        return self.apply(function, self.target(args[0]), [self.source(args[1], bits), self.source(args[2], 32)])

    def op_shf(self, parts: list[str], args: list[str]) -> Step:
        """A shift of two registers as one."""
        left, wrap = "l" in parts, "wrap" in parts

        def function(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
            by = (by & U32(31) if wrap else np.minimum(by, U32(32))).astype(U64)
            both = (high.astype(U64) << U64(32)) | low
            return ((both << by) >> U64(32) if left else both >> by).astype(U32)

        return self.apply(function, self.target(args[0]), [self.source(arg, 32) for arg in args[1:4]])

    def op_bfe(self, parts: list[str], args: list[str]) -> Step:
        """Some bits of a register, extended with their sign if signed."""
        signed = parts[-1] == "s32"
        if parts[-1] not in ("s32", "u32"):
            raise not_modelled(parts)

        def function(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
            at, length = (at & U32(255)).astype(np.int64), np.minimum(length & U32(255), 32).astype(np.int64)
            value = a.view(np.int32).astype(np.int64) if signed else a.astype(np.int64)
            value = (value >> np.minimum(at, 40)) & ((np.int64(1) << length) - 1)
            if signed:
                negative = (length > 0) & (value >> np.maximum(length - 1, 0) & 1 == 1)
                value = np.where(negative, value - (np.int64(1) << length), value)
            return value.astype(U32)

        return self.apply(function, self.target(args[0]), [self.source(arg, 32) for arg in args[1:4]])

    def op_prmt(self, parts: list[str], args: list[str]) -> Step:
        """Four bytes picked from two registers; the highest bit of a pick repeats the byte's sign."""
        if len(parts) != 2:
            raise not_modelled(parts)

        def function(low: np.ndarray, high: np.ndarray, picks: np.ndarray) -> np.ndarray:
            both = ((high.astype(U64) << U64(32)) | low).view(np.uint8).reshape(-1, 8)
            out = np.empty((len(low), 4), np.uint8)
            for place in range(4):
                pick = (picks >> U32(4 * place)) & U32(15)
                byte = np.take_along_axis(both, (pick & U32(7)).astype(int)[:, None], 1)[:, 0]
                out[:, place] = np.where(pick & U32(8), np.where(byte & 128, 255, 0), byte)
            return out.view(U32)[:, 0]

        return self.apply(function, self.target(args[0]), [self.source(arg, 32) for arg in args[1:4]])

    # -------------------------------------------------------------------------------------- choices and conversions

    def op_setp(self, parts: list[str], args: list[str]) -> Step:
        kind, flushed = TYPES[parts[-1]], "ftz" in parts
        if len(parts) != 3 + flushed or "|" in args[0]:
            raise not_modelled(parts)
        compare = (COMPARE_FLOATS if kind in FLOATS else COMPARE_INTEGERS)[parts[1]]

        def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            a, b = a.view(kind), b.view(kind)
            return compare(flush(a), flush(b)) if flushed else compare(a, b)

        return self.apply(function, self.target(args[0]), [self.source(arg, bits_of(parts[-1])) for arg in args[1:3]])

    def op_selp(self, parts: list[str], args: list[str]) -> Step:
        sources = [*(self.source(arg, bits_of(parts[-1])) for arg in args[1:3]), self.source(args[3], 1)]
        return self.apply(lambda a, b, chosen: np.where(chosen, a, b), self.target(args[0]), sources)

    def op_mov(self, parts: list[str], args: list[str]) -> Step:
        """Also of a register into its parts, and of parts into a register."""
        bits, values = 1 if parts[-1] == "pred" else bits_of(parts[-1]), self.values
        if args[0].startswith("{"):
            names, source = members(args[0]), self.source(args[1], bits)
            targets = [(place, self.target(name)) for place, name in enumerate(names) if name != "_"]

            def split() -> None:
                pieces = values[source].view(RAW[bits // len(names)]).reshape(-1, len(names))
                for place, target in targets:
                    values[target] = np.ascontiguousarray(pieces[:, place])

            return split
        if args[1].startswith("{"):
            names = members(args[1])
            sources = [self.source(name, bits // len(names)) for name in names]
            return self.apply(lambda *v: np.stack(v, 1).view(RAW[bits])[:, 0], self.target(args[0]), sources)
        return self.apply(lambda a: a, self.target(args[0]), [self.source(args[1], bits)])

    def op_cvt(self, parts: list[str], args: list[str]) -> Step:
        to, of = parts[-2:]
        if to in ("f16x2", "bf16x2") and "rn" in parts and of == "f32":
            lowest = 0 if "relu" in parts else -np.inf

            def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
                high, low = (narrow(np.where(f32(x) < lowest, 0, f32(x)), to[:-2]) for x in (high, low))
                return high.astype(U32) << U32(16) | low

            return self.apply(pair, self.target(args[0]), [self.source(arg, 32) for arg in args[1:3]])
        function = self.conversion(parts, to, of, bits_of(self.kind(args[0])))
        return self.apply(function, self.target(args[0]), [self.source(args[1], bits_of(of))])

    def conversion(self, parts: list[str], to: str, of: str, register: int) -> Callable:
        """From the bits of one type to those of another, in a register of `register` bits."""
        rounding = next((ROUND[part] for part in parts if part in ROUND), None)
        if to == "tf32" and of == "f32" and "rna" in parts:
            return lambda a: (a + U32(0x1000)) & U32(0xFFFFE000)
        if to in ("f16", "bf16") and of == "f32" and "rn" in parts:
            return lambda a: narrow(f32(a), to)
        if to == "f32" and of in ("f16", "bf16"):
            return lambda a: widen(a, of).view(U32)
        if to == "f32" and of == "f32" and rounding is not None:
            return lambda a: rounding(flush(f32(a)) if "ftz" in parts else f32(a)).view(U32)
        if to == "f32" and of[0] in "us" and "rn" in parts:
            return lambda a: a.view(TYPES[of]).astype(np.float32).view(U32)
        if to[0] in "us" and of == "f32" and rounding is not None:
            limits = np.iinfo(TYPES[to])

            def clamped(a: np.ndarray) -> np.ndarray:
                x = rounding(np.nan_to_num(f32(a).astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30))
                return np.clip(x, limits.min, float(limits.max)).astype(TYPES[to]).view(RAW[register])

            return clamped
        if to[0] in "usb" and of[0] in "usb" and "sat" not in parts:
            extended = SIGNED[register] if to[0] == "s" else RAW[register]

            def integer(a: np.ndarray) -> np.ndarray:
                kept = a.astype(RAW[bits_of(of)]).view(TYPES[of])
                return kept.astype(TYPES[to]).astype(extended).view(RAW[register])

            return integer
        raise not_modelled(parts)
