"""What a compiled kernel may take, and which calls are compiled: one of each kernel, at one width in fp16, in
`make test`; every shipped tile shape and variant in `make test-all`.
"""

import pytest
import torch
import triton

from tests.tools import offline

# Instructions of a matrix unit; those of Hopper and Blackwell take 64 rows at least, else they run as on Ampere.
MATRIX_UNIT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
TURING = 75  # for which Triton has none; and exact fp32 products use none anywhere
CALLS = list(offline.calls(64, torch.float16))
PRECISIONS = [(torch.float16, "half"), (torch.bfloat16, "half"), (torch.float32, "high"), (torch.float32, "highest")]


# One call of each kernel; the others are variants of these.
KERNELS = {
    "pack, channels first", "segment mean", "linear mean", "linear mean backward",
    "lse", "mean", "cross-entropy", "lse backward", "mean backward", "cross-entropy backward",
}  # fmt: skip


# Bytes that the compilers of older versions may spill, by capability and call: fp16, 128 wide, the quick slice.
SPILLED = {
    (3, 4): {
        (90, "both backward"): 8, (90, "both backward, scale"): 8, (90, "lse backward"): 8,
        (90, "lse backward, anchors"): 8, (90, "lse backward, keys"): 8, (100, "lse"): 16, (100, "lse backward"): 8,
        (100, "cross-entropy"): 16,
    },
}  # fmt: skip
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])


def spilled(capability, dtype, dim, name):
    """Bytes that this version of the compiler is known to spill where the newest one spills none."""
    return SPILLED.get(VERSION, {}).get((capability, name), 0) if (dtype, dim) == (torch.float16, 128) else 0


def targets(capabilities, calls=CALLS):
    """Every part, dtype and precision, width that has shapes of its own, and call."""
    for capability in capabilities:
        for dtype, precision in PRECISIONS:
            if capability == TURING and (dtype == torch.bfloat16 or precision == "high"):
                continue
            if capability == 89 and dtype != torch.float16:
                continue  # its shapes and matrix instructions are those of 86
            dims = (128,) if dtype == torch.bfloat16 else (64, 128, 256, 512)
            for dim in (16, *dims) if dtype == torch.float16 else dims:
                for name in calls:
                    quick = (dtype, dim) == (torch.float16, 128) and (name in KERNELS or capability == 90)
                    mark = [] if quick else pytest.mark.slow
                    yield pytest.param(capability, dtype, precision, dim, name, marks=mark)


def assert_budget(capability, dtype, precision, dim, name):
    with offline.recorded(capability) as launches:
        offline.calls(dim, dtype)[name]()
    for launch in launches:
        made = offline.compile_for(launch, capability)
        about = f"{launch.kernel.__name__} {launch.constants} {launch.options}: {made}"
        # The compiler spills a few bytes of fp32 programs to fit one more of them; half precision has nothing to give.
        allowed = spilled(capability, dtype, dim, name) if precision == "half" else 64
        assert made.spilled_bytes <= allowed, about
        assert made.shared_bytes <= offline.SHARED_LIMIT[capability], about
        # Assemblers before 13.3 may reuse such registers (DESIGN.md, "Older versions of Triton").
        assert not made.code.overwritten(), about
        if "PRECISION" in launch.constants and capability != TURING and precision != "highest":
            unit = MATRIX_UNIT[capability] if launch.constants["BLOCK_I"] >= 64 else "HMMA"
            assert made.operations[unit], about
        if "PRECISION" in launch.constants and capability != TURING and launch.options["num_stages"] > 1:
            assert made.operations["LDGSTS"], f"tiles are not loaded ahead: {about}"
