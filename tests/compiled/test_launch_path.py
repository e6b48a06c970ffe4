"""Every public loss, forward and backward, through Triton's launch path for GPUs that are not here: see launch_path.py.

In `make test` all cases in fp16 for one part, and one case for other dtypes and parts; the others in `make test-all`.
"""

import inspect
import re
import shutil

import pytest
import torch

from tests.tools.kernels import compile_or_skip
from tests.tools.launch_path import CASES, FIRST_SIZES, NO_LAUNCH, SIZES, Machine
from tests.tools.losses import LOSSES

compile_or_skip()
if shutil.which("cc") is None:
    pytest.skip("needs a C compiler", allow_module_level=True)

CAPABILITIES, DTYPES = (80, 90, 120), ("float16", "bfloat16", "float32")
# Kernels that more rows need: sums of blocks of them.
OF_MANY = {
    "segment_mean.block_sums_kernel", "segment_mean.segment_mean_kernel",
    "linear_mean.forward_kernel", "linear_mean.backward_kernel",
}  # fmt: skip
# Losses whose only kernels are those that pack rows and unpack their gradient.
NO_SUMS = {"PrototypeAssignmentLoss"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """One GPU of a compute capability, or several of them."""
    started = {}

    def start(capability, ranks=1, **environment):
        key = (capability, ranks, *environment.items())
        if key not in started:
            started[key] = Machine(capability, tmp_path_factory.mktemp("driver"), ranks, **environment)
        return started[key]

    yield start
    for one in started.values():
        one.stop()


FUNCTION = {loss.module.__name__: name for name, loss in LOSSES.items()}


def slowly(*values, quick):
    """Parameters, the last of which names a case; ids name its loss too."""
    of_loss = f"{'-'.join(map(str, values))} ({FUNCTION[CASES[values[-1]].loss]})"
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow, id=of_loss)


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [
        slowly(capability, dtype, name, quick=name == "region" or (capability, dtype) == (90, "float16"))
        for capability in CAPABILITIES
        for dtype in DTYPES
        if (capability, dtype) in ((80, "float16"), (120, "float16")) or capability == 90
        for name in CASES
    ],
)
def test_step(machine, capability, dtype, name):
    """Nothing raises, both passes launch, and a number of rows is no reason to compile."""
    gpu = machine(capability)
    for n in (*FIRST_SIZES, *SIZES):
        step = gpu.step(name, n, dtype)
        sums = CASES[name].loss not in NO_SUMS
        assert "rows.pack_kernel" in step["forward"] and len(step["forward"]) > sums, step
        assert "rows.unpack_kernel" in step["backward"] and len(step["backward"]) > sums, step
        if n in FIRST_SIZES[1:]:
            assert set(step["new"]) <= OF_MANY, f"{n} rows: {step}"
        if n in SIZES:
            assert not step["new"], f"{n} rows: {step}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("region, learnt", {"hardness": 1.0}),
        ("region, published, weights", {"temperature": 1.0, "hardness": 1.0, "discount": 1.0}),
        ("region, raw weights", {"temperature": 2.0, "hardness": 2.0}),
        ("ihpc, published", {"temperature": 1.0}),
        ("pixel, queue", {"temperature": 1.0}),
    ],
)
def test_whole_numbers_are_the_same_kernels(machine, name, options):
    """Triton compiles the integer 1 as a constant, and other integers as another type."""
    machine(90).step(name, 96, **options)
    assert not machine(90).step(name, 96, **{option: int(value) for option, value in options.items()})["new"]


@pytest.mark.parametrize(
    "name",
    [
        slowly(name, quick=name == "region")
        for name in {case.loss: name for name, case in reversed(CASES.items())}.values()
    ],
)
def test_step_of_two_ranks(machine, name):
    step = machine(90, ranks=2).step(name, 96, gather=True)
    assert step["forward"] and step["backward"]


@pytest.mark.parametrize(("name", "kernels"), [("region, batch", 10), ("region", 12)])
def test_first_step(machine, tmp_path, name, kernels):
    """What a training waits for: few kernels, made in seconds (of a processor, without those of Triton's launcher).

    The trial's are among them. A batch of maps uses them all again, but the smallest, and a single map, which lies
    otherwise in memory, packs with two of its own.
    """
    step = machine(90, TRITON_CACHE_DIR=str(tmp_path)).step(name, 1000)
    assert 0 < len(step["new"]) <= kernels, step
    assert "probe._touch" in step["new"] and len(set(step["new"])) == 9, step
    assert 0 < step["seconds"] <= 10, step


def test_wrong_numbers_are_told_once_and_serve_nobody(machine):
    """Here kernels launch and compute nothing: the trial must find that, which all other tests tell it not to."""
    found = machine(90).ask("tried")
    assert found["chosen"] == ["pytorch"] * 3
    wrong = (
        "a small step in float16 with 64 channels computes wrong numbers: rows off by .*, sums off by .*, gradient off"
    )
    (told,) = found["told"]
    assert re.match(f"hpcloss uses its PyTorch implementation on this GPU, not its Triton kernels: {wrong}", told)
    assert re.match(f"backend 'triton' cannot run this call: {wrong}", found["refused"])
    assert set(found["launched"]) == {
        "probe._touch", "rows.pack_kernel", "pair_lse.forward_kernel", "backward.largest_kernel",
        "pair_lse.statistics_kernel", "backward.backward_kernel", "rows.unpack_kernel",
    }  # fmt: skip
    assert set(found["launched"].values()) == {1}


def test_every_kernel_is_launched(machine):
    from tests.tools import offline

    steps = [machine(90).step(name, n) for name in CASES for n in FIRST_SIZES]
    launched = {kernel for step in steps for half in ("forward", "backward") for kernel in step[half]}
    known = {f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}" for kernel in offline.kernels()}
    # The probe launches its own kernel before the first step of a process.
    assert known - {"probe._touch"} <= launched <= known


def test_the_driver_refuses(machine):
    grid, pointer = machine(90).ask("refusals")
    assert "_touch: a grid of 1 x 70000 x 1 programs" in grid
    assert "compiled for a multiple of 16 bytes" in pointer


@pytest.mark.parametrize("loss", FUNCTION)
def test_every_option_has_a_case(loss):
    """A new option or input of a loss belongs in CASES, or an option in NO_LAUNCH."""
    constructor = LOSSES[FUNCTION[loss]].module
    makers = [constructor, *([constructor.published] if hasattr(constructor, "published") else [])]
    options = {name for maker in makers for name in inspect.signature(maker).parameters} - {"options"}
    inputs = [name for name in inspect.signature(constructor.forward).parameters if name != "self"]
    seen, given = set(), set()
    for case in CASES.values():
        if case.loss == loss:
            leaves, others = case.inputs(FIRST_SIZES[0], torch.float32)
            seen, given = seen | case.options, given | set(others) | set(inputs[: len(leaves)])
    assert options - seen <= NO_LAUNCH, f"no case gives these options: {options - seen - NO_LAUNCH}"
    assert set(inputs) == given
