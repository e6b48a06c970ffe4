"""What the compiler makes of the kernels, besides their budgets (test_budgets_*.py): launches, machine code, the table
of hpcloss/DESIGN.md, AMD parts, where nothing spills to memory.
"""

from pathlib import Path

import pytest
import torch
import triton

import hpcloss
from hpcloss.backends.triton import probe
from tests.tools import kernel_table, offline
from tests.tools.budgets import CALLS, KERNELS, VERSION
from tests.tools.machine_code import MachineCode, trip


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1", "3.9.0", "3.8.0+git12ab"])
def test_no_tile_is_copied_ahead_where_the_fence_is_missing(version, monkeypatch):
    """On sm_100 before Triton 3.7.1."""
    monkeypatch.setattr(triton, "__version__", version)
    with offline.recorded(100) as launches:
        for call in offline.calls(128, torch.float16).values():
            call()
    stages = {launch.options["num_stages"] for launch in launches if launch.options.get("num_stages")}
    assert stages == {1} if version in ("3.6.0", "3.7.0") else max(stages) > 1


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
                # Of a member of a group nothing can be said.
                assert not isinstance(value, tuple) or not any(type(member) is int for member in value)


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


# ------------------------------------------------------------------------------------------------------ machine code

# A loop of two trips around one over tiles, whose first branch leads around a mask.
LOOPS = """
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/               @P3 BRA P6, 0x80 ;
        /*0050*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0060*/                   SEL R2, R3, R4, P0 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   MUFU.EX2 R6, R6 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P1 BRA 0x20 ;
        /*00b0*/              @!P0 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""


def test_the_machine_code_is_read():
    assert trip(MachineCode(LOOPS)) == {
        "instructions": 6, "special": 1, "matrix": 1, "copies": "0/0/1", "barriers": 1, "barriers a region": 1,
        "loops": 2,
    }  # fmt: skip


def test_registers_of_a_running_product_are_not_written():
    product = "/*0000*/ HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24, gsb0 ;\n"
    wait, write = "/*0010*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n", "/*0020*/ F2FP.F16.F32.PACK_AB R7, R9, R8 ;\n"
    assert MachineCode(product + write).overwritten() == ["F2FP.F16.F32.PACK_AB R7, R9, R8 "]
    assert MachineCode(product + write.replace("R7", "R8")).overwritten() == []
    assert MachineCode(product + wait + write).overwritten() == []


@pytest.mark.parametrize("name", kernel_table.CALLS_IN_DESIGN)
def test_the_table_in_the_design(name):
    """It is what `python -m tests.tools.kernel_table 90 128 --into hpcloss/DESIGN.md` writes, of Triton 3.9 or 3.6."""
    part, dim = kernel_table.IN_DESIGN
    text = Path(hpcloss.__file__).with_name("DESIGN.md").read_text()
    found = kernel_table.between(text, str(part), dim, "float16")
    assert found is not None or VERSION not in ((3, 9), (3, 6)), "no table of this Triton"
    if found is None:
        pytest.skip(f"no table of Triton {triton.__version__}")
    printed = [line for line in found[1].splitlines() if line.startswith(f"| {name} |")]
    assert printed == kernel_table.rows(str(part), dim, torch.float16, [name])


# --------------------------------------------------------------------------------------------------------------- AMD


@pytest.mark.skipif(VERSION < (3, 6), reason="older versions of Triton need the linker of ROCm")
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(one, name, marks=[] if one == "gfx942" and name in KERNELS else pytest.mark.slow)
        for one in offline.AMD
        for name in CALLS
    ],
)
def test_amd(architecture, name):
    """Compiles to assembly that uses the matrix units; nobody has tuned its shapes, which are those of Turing."""
    with offline.recorded(0) as launches:
        offline.calls(128, torch.float16)[name]()
    for launch in launches:
        made = offline.compile_for_amd(launch, architecture)
        about = f"{launch.kernel.__name__} {launch.constants} {launch.options}: {made}"
        assert made.shared_bytes <= offline.AMD_SHARED_LIMIT, about
        assert made.scratch_bytes == 0, about
        if "PRECISION" in launch.constants:
            assert made.matrix, about
