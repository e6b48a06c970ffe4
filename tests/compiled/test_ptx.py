"""The interpreter of PTX by itself, then whole losses in the machine code's last readable form, against float64.

The kernels are compiled for GPUs that are not here and run on the CPU: addresses outside a tensor, memory that nobody
wrote, and races show. A few losses in `make test`; all of them, and more dtypes and parts, in `make test-all`.
"""

import inspect
import math
import re
import struct
from unittest import mock

import pytest
import torch

from tests.tools.cases import choice, integers, rows
from tests.tools.kernels import compile_or_skip
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_within_budget

compile_or_skip()
import triton  # noqa: E402

from hpcloss import backends  # noqa: E402
from hpcloss.backends.triton import probe  # noqa: E402
from hpcloss.backends.triton.trial import failure  # noqa: E402
from hpcloss.plan.partition import one_to_one  # noqa: E402
from tests.tools import offline, tf32  # noqa: E402
from tests.tools.ptx import Fault, Kernel  # noqa: E402
from tests.tools.ptx.backend import Machine  # noqa: E402

THREADS = 64
# Up to Triton 3.7.0 the compiler leaves out the fence between cp.async and wgmma (DESIGN.md).
NO_FENCE = "wgmma over cp.async without fence.proxy.async"
LEAVES_OUT_FENCES = tuple(int(number) for number in triton.__version__.split(".")[:3]) < (3, 7, 1)

# ------------------------------------------------------------------------------------------------------ instructions


def kernel(body, threads=THREADS, shared=4096):
    """%rd0, %rd1: addresses of the first and second tensor. %r9: the thread. %rd2: of its 16 bytes of the first."""
    return Kernel(
        f"""
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u64 .ptr .global .align 1 test_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [test_param_0];
    ld.param.b64 %rd1, [test_param_1];
    mov.u32 %r9, %tid.x;
    mul.wide.u32 %rd2, %r9, 16;
    add.s64 %rd2, %rd0, %rd2;
    {body}
    ret;
}}
""",
        shared,
    )


def unary(body, inputs):
    """The bits of %r3 of each thread, from its three inputs in %r0, %r1, %r2."""
    x = torch.tensor(inputs, dtype=torch.int64).to(torch.int32)
    x, out = torch.cat([x, torch.zeros(len(x), 1, dtype=torch.int32)], 1), torch.zeros(len(x), dtype=torch.int32)
    one = kernel(
        f"ld.global.v4.b32 {{%r0, %r1, %r2, %r4}}, [%rd2]; {body}; mul.wide.u32 %rd3, %r9, 4; add.s64 %rd3, %rd1, %rd3;"
        "st.global.b32 [%rd3], %r3;",
        threads=len(x),
    )
    one.launch(1, [x, out])
    assert not one.hazards.counts, one.hazards
    return [value & 0xFFFFFFFF for value in out.tolist()]


def signed(value):
    return value - 2**32 if value >> 31 else value


def towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extracted(value, at, length, is_signed):
    part = value >> at & (2**length - 1)
    return part - 2**length if is_signed and part >> (length - 1) else part


INTEGERS = {
    "add.s32 %r3, %r0, %r1": lambda a, b, c: a + b,
    "sub.s32 %r3, %r0, 7": lambda a, b, c: a - 7,
    "mul.lo.s32 %r3, %r0, %r1": lambda a, b, c: a * b,
    "mul.hi.u32 %r3, %r0, %r1": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r3, %r0, %r1": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r3, %r0, %r1, %r2": lambda a, b, c: a * b + c,
    "mul.wide.s32 %rd3, %r0, %r1; mov.b64 {%r4, %r3}, %rd3": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.wide.u32 %rd3, %r0, %r1, 9; mov.b64 {_, %r3}, %rd3": lambda a, b, c: a * b + 9 >> 32,
    "or.b32 %r4, %r1, 1; div.s32 %r3, %r0, %r4": lambda a, b, c: towards_zero(signed(a), signed(b | 1)),
    "or.b32 %r4, %r1, 1; rem.u32 %r3, %r0, %r4": lambda a, b, c: a % (b | 1),
    "min.s32 %r3, %r0, %r1": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r3, %r0, %r1": lambda a, b, c: max(a, b),
    "neg.s32 %r3, %r0": lambda a, b, c: -a,
    "abs.s32 %r3, %r0": lambda a, b, c: abs(signed(a)),
    "not.b32 %r3, %r0": lambda a, b, c: ~a,
    "lop3.b32 %r3, %r0, %r1, %r2, 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %r3, %r0, %r1, %r2, 0xea": lambda a, b, c: a & b | c,
    "and.b32 %r4, %r1, 63; shl.b32 %r3, %r0, %r4": lambda a, b, c: a << (b & 63),
    "and.b32 %r4, %r1, 63; shr.u32 %r3, %r0, %r4": lambda a, b, c: a >> (b & 63),
    "and.b32 %r4, %r1, 63; shr.s32 %r3, %r0, %r4": lambda a, b, c: signed(a) >> (b & 63),
    "shf.l.wrap.b32 %r3, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r3, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r3, %r0, 5, 9": lambda a, b, c: extracted(a, 5, 9, False),
    "bfe.s32 %r3, %r0, 5, 9": lambda a, b, c: extracted(a, 5, 9, True),
    "prmt.b32 %r3, %r0, %r1, 0x5410": lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r3, %r0, %r1, 0xf70b": lambda a, b, c: (
        sum((255 if byte >> 7 else 0) << 8 * place for place, byte in ((0, a >> 24), (3, b >> 24)))
        | (a & 255) << 8 | b >> 24 << 16
    ),
    "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r3, %r0, %r2, %p0": lambda a, b, c: a if signed(a) < signed(b) else c,
    "mov.b32 %r3, %r0; setp.hi.u32 %p0, %r0, %r1; @%p0 add.s32 %r3, %r0, 1": lambda a, b, c: a + (a > b),
    "mov.b32 %r3, %r0; setp.hs.u32 %p0, %r0, %r1; @!%p0 mov.b32 %r3, 3": lambda a, b, c: a if a >= b else 3,
    "cvt.s32.s8 %r3, %r0": lambda a, b, c: extracted(a, 0, 8, True),
    "cvt.u32.u16 %r3, %r0": lambda a, b, c: a & 0xFFFF,
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body):
    edges = [0, 1, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF]
    values = torch.cat([integers(2**32, 56, 3), torch.tensor([[a, edges[-k], 3] for k, a in enumerate(edges)])])
    expected = [INTEGERS[body](*three) & 0xFFFFFFFF for three in values.tolist()]
    assert unary(body, values.tolist()) == expected


FLOATS = {
    "add.f32 %r3, %r0, %r1": lambda a, b, c: a + b,
    "sub.rn.f32 %r3, %r0, %r1": lambda a, b, c: a - b,
    "mul.f32 %r3, %r0, 0f40000000": lambda a, b, c: a * 2,
    "fma.rn.f32 %r3, %r0, %r1, %r2": lambda a, b, c: a * b + c,
    "div.full.f32 %r3, %r0, %r1": lambda a, b, c: a / b,
    "max.f32 %r3, %r0, %r1": lambda a, b, c: b if a.isnan() else torch.maximum(a, b),
    "max.NaN.f32 %r3, %r0, %r1": lambda a, b, c: torch.maximum(a, b),
    "neg.f32 %r3, %r0": lambda a, b, c: -a,
    "ex2.approx.ftz.f32 %r3, %r0": lambda a, b, c: torch.exp2(a),
    "abs.f32 %r4, %r0; lg2.approx.f32 %r3, %r4": lambda a, b, c: torch.log2(a.abs()),
    "abs.f32 %r4, %r0; rsqrt.approx.f32 %r3, %r4": lambda a, b, c: torch.rsqrt(a.abs()),
    "rcp.approx.f32 %r3, %r0": lambda a, b, c: 1 / a,
    "setp.neu.f32 %p0, %r0, %r0; selp.f32 %r3, 0f3F800000, 0f00000000, %p0": lambda a, b, c: a.isnan().double(),
    "setp.lt.f32 %p0, %r0, %r1; selp.f32 %r3, %r0, %r1, %p0": lambda a, b, c: torch.where(a < b, a, b),
    "cvt.rni.f32.f32 %r3, %r0": lambda a, b, c: a.round(),
    "cvt.rzi.s32.f32 %r4, %r0; cvt.rn.f32.s32 %r3, %r4": lambda a, b, c: a.nan_to_num().trunc(),
    "cvt.rn.f16x2.f32 %r4, %r1, %r0; mov.b32 {%rs0, %rs1}, %r4; cvt.f32.f16 %r3, %rs0": lambda a, b, c: (
        a.half().double()
    ),
    "cvt.rn.bf16x2.f32 %r4, %r0, %r1; and.b32 %r3, %r4, 0xffff0000": lambda a, b, c: a.bfloat16().double(),
}


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body):
    values = 4 * rows(64, 3, dtype=torch.float32)
    values[:4, 0] = torch.tensor([torch.nan, 0.5, 2.5, -3.5])
    bits = values.view(torch.int32).to(torch.int64)
    got = torch.tensor([struct.unpack("<f", struct.pack("<I", value))[0] for value in unary(body, bits.tolist())])
    expected = torch.stack([FLOATS[body](*three) for three in values.double()])
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_of_a_warp(dtype):
    """mma.m16n8k16, with the entries that the manual gives each lane."""
    a, b, c = rows(16, 16, dtype=dtype), rows(16, 8, seed=1, dtype=dtype), rows(16, 8, seed=2, dtype=torch.float32)
    lane = torch.arange(32)
    row, column = lane // 4, 2 * (lane % 4)
    pairs = [a[row + down][lane, column + right + k] for right in (0, 8) for down in (0, 8) for k in (0, 1)]
    pairs += [b[column + down + k, row] for down in (0, 8) for k in (0, 1)]
    halves = torch.stack(pairs, 1).contiguous().view(torch.int32)  # [32, 6]: four registers of A, two of B
    sums = torch.stack([c[row + down, column + k] for down in (0, 8) for k in (0, 1)], 1).view(torch.int32)
    x = torch.cat([halves, sums, torch.zeros(32, 6, dtype=torch.int32)], 1).contiguous()  # 64 bytes a lane
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    one = kernel(
        f"""mul.wide.u32 %rd2, %r9, 64;
    add.s64 %rd2, %rd0, %rd2;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd2];
    ld.global.v4.b32 {{%r14, %r15, %r16, %r17}}, [%rd2 + 16];
    ld.global.v2.b32 {{%r18, %r19}}, [%rd2 + 32];
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{ %r20, %r21, %r22, %r23 }}, """
        """{ %r10, %r11, %r12, %r13 }, { %r14, %r15 }, { %r16, %r17, %r18, %r19 };
    mul.wide.u32 %rd3, %r9, 16;
    add.s64 %rd3, %rd1, %rd3;
    st.global.v4.b32 [%rd3], {%r20, %r21, %r22, %r23};""",
        threads=32,
    )
    out = torch.zeros(32, 4)
    one.launch(1, [x, out])
    expected = (a.double() @ b.double() + c.double()).float()
    wanted = torch.stack([expected[row + down, column + k] for down in (0, 8) for k in (0, 1)], 1)
    assert torch.equal(out, wanted)


# ----------------------------------------------------------------------------------------------------------- hazards

OWN = "shl.b32 %r1, %r9, 2; add.s32 %r1, %r1, global_smem; st.shared.b32 [%r1], %r9;"  # each thread writes its word
OF_NEXT_WARP = "xor.b32 %r2, %r9, 32; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, global_smem;"
OF_NEXT_LANE = OF_NEXT_WARP.replace("32;", "1;", 1)
COPY = "shl.b32 %r1, %r9, 4; add.s32 %r1, %r1, global_smem; cp.async.cg.shared.global [%r1], [%rd2], 16;"
COPY += "cp.async.commit_group;"
HAZARDS = {
    "RAW": (f"{OWN} {OF_NEXT_WARP}", "bar.sync 0;", "ld.shared.b32 %r3, [%r2];"),
    "RAW in a warp": (f"{OWN} {OF_NEXT_LANE}", "bar.warp.sync -1;", "ld.shared.b32 %r3, [%r2];"),
    "WAR": (f"{OWN} {OF_NEXT_WARP} bar.sync 0; ld.shared.b32 %r3, [%r2];", "bar.sync 0;", "st.shared.b32 [%r1], 7;"),
    "WAR in a warp": (
        f"{OWN} {OF_NEXT_LANE} bar.sync 0; ld.shared.b32 %r3, [%r2];", "bar.warp.sync -1;", "st.shared.b32 [%r1], 7;"
    ),
    "WAW": (f"{OWN} {OF_NEXT_WARP}", "bar.sync 0;", "st.shared.b32 [%r2], %r9;"),
    "read under a running cp.async": (COPY, "cp.async.wait_group 0;", "ld.shared.b32 %r3, [%r1];"),
    "write under a running cp.async": (COPY, "cp.async.wait_group 0;", "st.shared.b32 [%r1], 7;"),
    "read of shared memory nobody wrote": ("mov.b32 %r1, global_smem;", "st.shared.b32 [%r1], 7; bar.sync 0;",
                                           "ld.shared.b32 %r3, [%r1];"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HAZARDS)
def test_hazards(kind):
    """Seen without the synchronisation, and not with it."""
    before, between, after = HAZARDS[kind]
    x = integers(9, THREADS, 4).to(torch.int32)
    for middle, expected in (("", True), (between, False)):
        one = kernel(f"{before} {middle} {after}")
        one.launch(1, [x, x.clone()])
        assert (kind in {kind for kind, _ in one.hazards.counts}) == expected, one.hazards
        assert expected or not one.hazards.counts, one.hazards


def test_an_asynchronous_copy_arrives_at_its_wait():
    x, out = integers(99, THREADS, 4).to(torch.int32), torch.zeros(THREADS, 4, dtype=torch.int32)
    store = "mul.wide.u32 %rd3, %r9, 16; add.s64 %rd3, %rd1, %rd3; st.global.v4.b32 [%rd3], {%r3, %r4, %r5, %r6};"
    load = "ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1];"
    kernel(f"{COPY} cp.async.wait_group 0; {load} {store}").launch(1, [x, out])
    assert torch.equal(out, x)
    kernel(f"{COPY} cp.async.wait_group 1; {load} {store}").launch(1, [x, out])
    assert not (out == x).any()


def test_programs_that_meet():
    x = torch.zeros(4, dtype=torch.int32)
    one = kernel("mov.u32 %r1, %ctaid.x; st.global.b32 [%rd0], %r1;")
    one.launch(2, [x, x])
    assert {kind for kind, _ in one.hazards.counts} == {"two programs write different values"}


FAULTS = {
    "out of bounds": "ld.global.b32 %r3, [%rd2 + 16];",
    "of no tensor": "shl.b64 %rd3, %rd2, 3; ld.global.b32 %r3, [%rd3];",
    "misaligned": "ld.global.b32 %r3, [%rd0 + 2];",
    "of shared memory": "mov.b32 %r1, global_smem; ld.shared.b32 %r3, [%r1 + 4096];",
    "threads part": "setp.lt.u32 %p0, %r9, 5; @%p0 bra $here; mov.b32 %r3, 0;\n$here:",
    "not modelled": "atom.global.add.u32 %r3, [%rd0], 1;",
}


@pytest.mark.parametrize("said", FAULTS)
def test_faults(said):
    x = torch.zeros(THREADS, 4, dtype=torch.int32)
    with pytest.raises(Fault, match=said):
        kernel(FAULTS[said]).launch(1, [x, x.clone()])


@pytest.mark.parametrize(("kind", "expected"), [("s32", -5), ("u32", 2**32 - 5)])
def test_a_parameter_in_a_wider_register(kind, expected):
    out = torch.zeros(1, dtype=torch.int64)
    one = Kernel(
        f"""
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u32 test_param_1
)
.reqntid {THREADS}
{{
    .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [test_param_0];
    ld.param.{kind} %rd1, [test_param_1];
    st.global.b64 [%rd0], %rd1;
    ret;
}}
""",
        shared_bytes=0,
    )
    one.launch(1, [out, -5])
    assert out.item() == expected


def test_a_loop():
    out = torch.zeros(THREADS, dtype=torch.int32)
    body = "mov.b32 %r3, 0; mov.b32 %r1, 0;\n$loop:\nadd.s32 %r3, %r3, %r1; add.s32 %r1, %r1, 1;"
    body += "setp.lt.s32 %p0, %r1, 10; @%p0 bra $loop; st.global.b32 [%rd0], %r3;"
    kernel(body).launch(1, [out, out])
    assert out[0] == 45


# ------------------------------------------------------------------------------------------------------------ losses


def vectors(n, dim):
    labels = integers(4, n)
    return [rows(n, dim) + rows(4, dim, seed=1)[labels]], [labels]


def views(n, dim):
    query = rows(n, dim)
    return [query, query + 0.7 * rows(n, dim, seed=1)], []


def queue(n, num_keys, dim):
    """Labels in order; most anchors have one that no key has, so whole blocks of them have no positive."""
    labels = torch.cat([torch.zeros(n - 40, dtype=torch.int64), torch.arange(40) % 3 + 1])
    return [rows(n, dim)], [labels, rows(num_keys, dim, seed=1), torch.arange(num_keys) % 3 + 1]


def maps(batch, dim, height, width, classes=4):
    """Patches of 5 pixels of one class, with some pixels of any."""
    patches = integers(classes, batch, (height + 4) // 5, (width + 4) // 5)
    labels = patches.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    labels = torch.where(choice([0, 0, 0, 0, 0, 1], *labels.shape) == 1, integers(classes, *labels.shape), labels)
    return [rows(batch, dim, height, width) + rows(classes, dim, seed=1)[labels].movedim(-1, 1)], [labels]


# Name of the loss, inputs, options; "learnt": a temperature with a gradient. Tiles end inside and outside of intervals.
LOSSES = {
    "supcon": ("supcon", vectors(201, 64), {}),
    "supcon in, 100 channels": ("supcon", vectors(133, 100), {"form": "in"}),
    "supcon, blocks of rows": ("supcon", vectors(600, 32), {}),
    "supcon, cold": ("supcon", vectors(130, 32), {"temperature": 0.01}),
    "supcon raw": ("supcon", vectors(97, 64), {"temperature": 8.0, "normalize": False}),
    "supcon, keys of few labels": ("supcon", queue(200, 90, 64), {}),
    "ntxent": ("ntxent", views(75, 128), {}),
    "ntxent, blocks of rows": ("ntxent", views(300, 32), {}),
    "infonce": ("infonce", views(150, 64), {"learnt": 0.1}),
    "infonce symmetric": ("infonce", views(131, 48), {"symmetric": True}),
    "infonce symmetric, learnt": ("infonce", views(131, 64), {"symmetric": True, "learnt": 0.1}),
    "region": ("region_phpc", maps(2, 64, 13, 11), {"region_size": 8, "num_classes": 4}),
    "region, 40 channels": ("region_phpc", maps(1, 40, 15, 13), {"region_size": 8}),
    "region, discount": ("region_phpc", maps(2, 64, 12, 12), {"region_size": 6, "hardness": 0.0, "discount": 0.1}),
    "region, weights": ("region_phpc", maps(2, 32, 11, 12), {"region_size": None, "detach_weights": False}),
    "region raw, weights": (
        "region_phpc", maps(1, 32, 12, 12),
        {"region_size": None, "temperature": 8.0, "hardness": 0.1, "detach_weights": False, "normalize": False},
    ),
    "region local": ("region_phpc", maps(1, 64, 16, 16), {"region_size": 8, "local_size": 4, "num_classes": 4}),
    "region supcon": ("region_supcon", maps(2, 16, 16, 9, classes=2), {"region_size": 8, "background": None}),
    "local": ("local_contrast", maps(2, 64, 12, 12), {"num_classes": 4, "samples_per_class": None}),
    "hard negatives": ("hard_negative_nce", views(70, 64), {}),
    "ihpc": ("ihpc", views(70, 64), {}),
}  # fmt: skip
QUICK = {
    (80, "float16"): {
        "supcon", "supcon, keys of few labels", "infonce symmetric, learnt", "region", "region raw, weights", "local",
    },
    (90, "float16"): {"region", "infonce"},
    (120, "float16"): {"region"},
}  # fmt: skip
# Of the inputs; and of the plain computation, for which tf32 is fp16: it has as many bits.
TYPES = {
    "float16": (torch.float16, torch.float16), "bfloat16": (torch.bfloat16, torch.bfloat16),
    "tf32": (torch.float32, torch.float16), "ieee": (torch.float32, torch.float32),
}  # fmt: skip


def losses():
    for capability in (80, 90, 120):
        for kind in TYPES:
            for name in LOSSES:
                quick = name in QUICK.get((capability, kind), ())
                of_loss = f"{capability}-{kind}-{name} ({LOSSES[name][0]})"
                yield pytest.param(capability, kind, name, marks=[] if quick else pytest.mark.slow, id=of_loss)


def evaluate(name, functions, tested, dtype, shift=0, **backend):
    """Loss and gradients, computed in `dtype` from inputs that are exact in `tested`; shift: of their channels."""
    loss, (inputs, others), options = LOSSES[name]
    taken = inspect.signature(functions[loss]).parameters  # the reference knows nothing of speed
    options = {option: value for option, value in options.items() if option in taken or option == "learnt"}
    others = [x.roll(shift, 1).to(tested).to(dtype) if x.is_floating_point() else x for x in others]
    leaves = [x.roll(shift, 1).to(tested).to(dtype).requires_grad_() for x in inputs]
    wanted = list(leaves)
    if "learnt" in options:
        options["temperature"] = torch.tensor(options.pop("learnt")).to(tested).to(dtype).requires_grad_()
        wanted.append(options["temperature"])
    value = functions[loss](*leaves, *others, **options, **backend)
    grads = torch.autograd.grad(value, wanted)
    return [value.detach(), *(grad.roll(-shift, 1) if grad.dim() else grad for grad in grads)]


def plain(name, tested, dtype, exact):
    """The reference in `dtype`, which may be lucky: its worst of three counts, as in `problems.Problem.check`.

    Each has another order of channels. The log-sum that both passes share is at least log N; one place up or down of it
    is a factor of the gradient.
    """
    place = 1 + 1.2e-7 * math.log(LOSSES[name][1][0][0].shape[0])
    results = [
        [value.double(), *(grad.double() * factor for grad in grads)]
        for shift, factor in enumerate((1, place, 1 / place))
        for value, *grads in [evaluate(name, ORACLE, tested, dtype, shift)]
    ]
    return [farthest(three, right) for *three, right in zip(*results, exact, strict=True)]


def farthest(results, exact):
    return max(results, key=lambda result: (result - exact).abs().sum())


def exact(name, kind, tested):
    """In float64, for tf32 of the rows as they are packed."""
    if kind != "tf32":
        return evaluate(name, ORACLE, tested, torch.float64)
    tiles = backends.load("blockwise")
    pack = tiles.pack

    def packed(*arguments):
        rows, inverse_norm = pack(*arguments)
        return tf32.rounded(rows), inverse_norm

    with mock.patch.object(tiles, "pack", packed):
        return evaluate(name, FAST, tested, torch.float64, backend="blockwise")


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield lambda kind: torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("capability", "kind", "name"), list(losses()))
def test_losses(capability, kind, name, precision):
    """Values and gradients within the budget of the reference in the same precision; no fault, and no hazard but one.

    The fence that older compilers leave out must be missed: where a version has it, it is no longer expected.
    """
    precision(kind)
    tested, dtype = TYPES[kind]
    if kind == "float16" and not LOSSES[name][2].get("normalize", True):
        dtype = torch.bfloat16  # raw rows are packed in it, for its range
    machine = Machine(capability)
    with machine():
        results = evaluate(name, FAST, tested, tested, backend="triton")
    hazards = machine.hazards()
    unfenced = LEAVES_OUT_FENCES and any("cp.async" in ptx and "wgmma.mma_async" in ptx for ptx in machine.kernels)
    assert hazards.keys() == ({NO_FENCE} if unfenced else set()), hazards
    right = exact(name, kind, tested)
    for place, three in enumerate(zip(results, plain(name, tested, dtype, right), right, strict=True)):
        assert_within_budget(*three, "grad" if place else "loss", dtype)


@pytest.mark.parametrize("spread", tf32.SPREADS.values(), ids=tf32.SPREADS)
@pytest.mark.parametrize("name", tf32.LOSSES)
def test_tf32_as_emulated(name, spread, precision):
    """The errors of DESIGN.md's table are those of the compiled kernels, to a tenth of them; fp32 adds its own."""
    precision("tf32")
    case = name, 192, spread, 0.1
    features, labels, regions = tf32.inputs(*case[:3])
    leaves = [x.float().requires_grad_() for x in features]
    machine = Machine(80)
    with machine():
        if name == "region PHPC":
            size = len(labels) // tf32.REGIONS
            value = FAST["region_phpc"](
                leaves[0].T[None], labels[None], size, background=None, backend="triton", num_classes=tf32.CLASSES
            )
        elif name == "SupCon":
            value = FAST["supcon"](leaves[0], labels, backend="triton")
        else:
            value = FAST["infonce"](*leaves, backend="triton")
        grads = torch.autograd.grad(value, leaves)
    assert not machine.hazards(), machine.hazards()
    emulated, exact = (tf32.evaluate(form, *case) for form in (tf32.FORMS[tf32.KERNELS], tf32.EXACT))
    # Logits reach 10, where fp32 has places of 2^-20. Where both parts of a small loss are off by one, so is its size.
    for found, predicted, right, noise in zip((value, torch.cat(grads)), emulated, exact, (2 * 2**-20, 1e-6)):
        predicted_error, distance = ((x - y).norm() for x, y in ((predicted, right), (found.double(), predicted)))
        assert predicted_error > 0 and distance < 0.1 * predicted_error + noise * right.norm()


@pytest.mark.parametrize(
    ("capability", "kind"),
    [
        pytest.param(capability, kind, marks=[] if (capability, kind) == (80, "float16") else pytest.mark.slow)
        for capability in (80, 90, 120)
        for kind in TYPES
    ],
)
def test_trial(capability, kind, precision):
    """The kernels that `auto` tries first are right, and are found to be."""
    precision(kind)
    machine = Machine(capability)
    with machine():
        for channels in (16, 64, 512):
            assert failure(torch.device("cpu"), TYPES[kind][0], channels) == ("", True)
    assert not machine.hazards(), machine.hazards()


# A mistake of a compiler: in which kernel, what is compiled and what it should have been; and what is found wrong.
MISCOMPILED = {
    "pack_kernel": ("rsqrt.approx.ftz.f32", "rcp.approx.f32", "rows"),
    "forward_kernel": ("ex2.approx.ftz.f32", "lg2.approx.f32", "sums"),
    "backward_kernel": ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32", "gradient"),
    "unpack_kernel": ("neg.f32", "abs.f32", "gradient"),
}


@pytest.mark.parametrize("kernel", MISCOMPILED)
def test_the_trial_finds_wrong_kernels(kernel):
    right, wrong, result = MISCOMPILED[kernel]
    machine = Machine(80, lambda ptx: ptx.replace(right, wrong) if f".entry {kernel}(" in ptx else ptx)
    with machine():
        reason, lasts = failure(torch.device("cpu"), torch.float16, 64)
    assert re.match(rf"a small step in float16 with 64 channels computes wrong numbers: .*\b{result} off by", reason)
    assert lasts


@pytest.mark.parametrize("capability", [80, 90])
def test_a_mean_over_positives_of_blocks_that_have_none(capability):
    """A loop that loads ahead starts at a row that is there, also where it makes no trip."""
    intervals = [x.clone() for x in one_to_one(200, torch.device("cpu")).intervals]
    intervals[0][:160] = intervals[1][:160] = 0
    x, keys = (torch.nn.functional.normalize(rows(200, 64, seed=seed), dim=1).half() for seed in (0, 1))
    options = (torch.zeros(200), None, torch.tensor(10.0), 10.0, 1.0, 0.0, intervals)
    machine = Machine(capability)
    with machine():
        results = backends.load("triton").pair_mean(x, keys, *options)
    assert machine.hazards().keys() <= ({NO_FENCE} if LEAVES_OUT_FENCES else set()), machine.hazards()
    for result, right in zip(results, backends.load("blockwise").pair_mean(x.float(), keys.float(), *options)):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5)


def test_every_kernel_has_a_loss():
    with Machine(80)(), offline.recorded(80) as launches:
        for name in LOSSES:
            evaluate(name, FAST, torch.float16, torch.float16, backend="triton")
    assert {launch.kernel for launch in launches} == offline.kernels() - {probe._touch}


def kernels_of(name, change=lambda ptx: ptx):
    """The kernels of a loss, by the PTX that the compiler made; `change` makes that which runs."""
    machine = Machine(80, change)
    with machine():
        evaluate(name, FAST, torch.float16, torch.float16, backend="triton")
    return machine.kernels


def test_each_wait_is_needed():
    """A wait that leaves one more copy on its way is seen, wherever a kernel loads ahead."""
    pattern, seen = re.compile(r"cp\.async\.wait_group\s+(\d+)"), 0
    for text in kernels_of("region"):
        for wait in pattern.finditer(text):
            late = f"{text[: wait.start(1)]}{int(wait[1]) + 1}{text[wait.end(1) :]}"
            try:
                kernel = kernels_of("region", lambda ptx: late if ptx == text else ptx)[text]  # noqa: B023
                assert kernel.hazards.counts, f"{wait[0]} of {kernel.program.name}"
            except Fault:
                pass  # what it computed from other numbers
            seen += 1
    assert seen >= 6
