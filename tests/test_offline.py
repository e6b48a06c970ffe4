"""Shipped kernels compiled for every supported GPU: nothing spills, shared memory fits, the matrix units are used.

One call of each kernel, at one width in fp16, in `make test`; every shipped tile shape and variant in `make test-all`.
"""

import pytest
import torch
from kernels import compile_or_skip

compile_or_skip()
import offline  # noqa: E402

from hpcloss.backends.triton import probe  # noqa: E402

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


def targets():
    """Every part, dtype and precision, width that has shapes of its own, and call."""
    for capability in (TURING, *MATRIX_UNIT):
        for dtype, precision in PRECISIONS:
            if capability == TURING and (dtype == torch.bfloat16 or precision == "high"):
                continue
            if capability == 89 and dtype != torch.float16:
                continue  # its shapes and matrix instructions are those of 86
            dims = (128,) if dtype == torch.bfloat16 else (64, 128, 256, 512)
            for dim in (16, *dims) if dtype == torch.float16 else dims:
                for name in CALLS:
                    quick = (dtype, dim) == (torch.float16, 128) and (name in KERNELS or capability == 90)
                    mark = [] if quick else pytest.mark.slow
                    yield pytest.param(capability, dtype, precision, dim, name, marks=mark)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("capability", "dtype", "precision", "dim", "name"), list(targets()))
def test_budget(capability, dtype, precision, dim, name, matmul_precision):
    matmul_precision("highest" if precision == "half" else precision)
    with offline.recorded(capability) as launches:
        offline.calls(dim, dtype)[name]()
    for launch in launches:
        made = offline.compile_for(launch, capability)
        about = f"{launch.kernel.__name__} {launch.constants} {launch.options}: {made}"
        # The compiler spills a few bytes of fp32 programs to fit one more of them; half precision has nothing to give.
        assert made.spilled_bytes <= (0 if precision == "half" else 64), about
        assert made.shared_bytes <= offline.SHARED_LIMIT[capability], about
        if "PRECISION" in launch.constants and capability != TURING and precision != "highest":
            unit = MATRIX_UNIT[capability] if launch.constants["BLOCK_I"] >= 64 else "HMMA"
            assert made.operations[unit], about
        if "PRECISION" in launch.constants and capability != TURING and launch.options["num_stages"] > 1:
            assert made.operations["LDGSTS"], f"tiles are not loaded ahead: {about}"


def test_a_changing_number_of_rows_compiles_nothing_new():
    """Sizes are no part of what is compiled: neither N = 1 nor a multiple of 16 is a case of its own."""
    for capability in (80, 90):
        with offline.recorded(capability) as launches:
            for call in offline.calls(64, torch.float16).values():
                call()
        for launch in launches:
            for parameter in launch.kernel.params:
                value = (dict(zip(launch.kernel.arg_names, launch.args)) | launch.constants)[parameter.name]
                if type(value) is int and not parameter.is_constexpr:
                    assert parameter.do_not_specialize, f"{launch.kernel.__name__}: {parameter.name}"


def test_every_kernel_is_launched_and_again():
    """Triton's own launch, up to loading: arguments bind, kernels compile, and the second call finds them unchanged."""
    launched, calls = set(), offline.calls(64, torch.float16)
    for name in sorted(KERNELS):
        with offline.launched(90) as first:
            calls[name]()
        with offline.launched(90) as second:
            calls[name]()
        assert [id(built) for _, built in first] == [id(built) for _, built in second], f"{name} compiles anew"
        launched |= {kernel for kernel, _ in first}
    with offline.launched(90) as first:
        probe._touch[(1,)](torch.zeros(1))
    assert offline.kernels() == launched | {kernel for kernel, _ in first}, "KERNELS names a call of each"
