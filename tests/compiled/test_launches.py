"""What a step asks of a GPU, counted without one: operations of torch, kernels of Triton and of the native library.

`python -m tests.compiled.test_launches` prints the table of DESIGN.md.
"""

import collections
import contextlib
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hpcloss
from hpcloss import operators
from hpcloss.plan.partition import partition
from hpcloss.plan.regions import Grid
from hpcloss.primitives import rows as row_primitives
from hpcloss.primitives.rows import pack
from tests.tools.cases import choice, cuda_on_cpu, implementations, integers, rows
from tests.tools.kernels import INTERPRETED

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(INTERPRETED, reason="in the interpreter kernels copy their arguments"),
]
# What launches nothing, besides views: memory, and numbers that stay on the host. The rest launches one kernel each.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor"}
# Of torch, these launch several.
OF_SEVERAL = {"sort", "cummax", "cummin", "unique", "nonzero"}
SMALL, LARGE = (2, 24, 24), (8, 256, 256)  # label maps


class Operations(TorchDispatchMode):
    """Names of the torch operations that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        library, name = function._schema.name.split("::")
        is_view = (
            isinstance(result, torch.Tensor)
            and not function._schema.is_mutable
            and any(
                isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata == result.untyped_storage()._cdata
                for arg in args
            )
        )
        if library != "hpcloss" and name not in FREE and not is_view:
            self.names.append(name)
        return result


@contextlib.contextmanager
def counting():
    """Calls a function as on a GPU and names what it launches; what kernels would compute is missing."""
    from tests.tools import offline

    def count(function):
        mode, autocast = Operations(), torch.autocast

        @contextlib.contextmanager
        def seen(*args, **kwargs):
            """An operator, whose body torch shows to no mode, switches autocast off for it."""
            with autocast(*args, **kwargs), mode:
                yield

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_primitives, "resolve", lambda name, tensor: "triton")
            patch.setattr(operators.torch, "autocast", seen)
            library = cuda_on_cpu()
            before = library.hpcloss_emulator_launches()
            with offline.recorded(90) as kernels, mode:
                function()
            native_kernels = library.hpcloss_emulator_launches() - before
        assert len(kernels) > 0 and native_kernels > 0
        assert not OF_SEVERAL.intersection(mode.names), mode.names
        return mode.names + [launch.kernel.__name__ for launch in kernels] + ["native"] * native_kernels

    with contextlib.contextmanager(implementations)("cuda"):
        yield count


@pytest.fixture(scope="module")
def launches():
    with counting() as count:
        yield count


def map_step(shape, dtype, loss, *arguments, **options):
    """Forward and backward of a loss of maps on inputs that are there already."""
    batch, *spatial = shape
    features = rows(batch, 16, *spatial, dtype=torch.float32).to(dtype).requires_grad_()
    labels, loss = choice([0, 1, 2, 3, 255], *shape), loss(*arguments, **options)
    return lambda: torch.autograd.grad(loss(features, labels), features)


def vector_step(count, dtype, num_keys=None, **options):
    """The same of SupConLoss, with separate keys or without."""
    inputs = [
        rows(number, 16, dtype=torch.float32).to(dtype).requires_grad_() for number in (count, num_keys) if number
    ]
    labels, loss = [integers(5, len(one)) for one in inputs], hpcloss.SupConLoss(**options)
    arguments = [x for pair in zip(inputs, labels, strict=True) for x in pair]
    return lambda: torch.autograd.grad(loss(*arguments), inputs)


PHPC, SUPCON = hpcloss.RegionPHPCLoss, hpcloss.RegionSupConLoss
# Each step with the most it may launch, in fp16 and in fp32.
STEPS = {
    "region PHPC, num_classes": (lambda dtype: map_step(SMALL, dtype, PHPC, 8, num_classes=4), 25),
    "region PHPC, 8 x 256 x 256": (lambda dtype: map_step(LARGE, dtype, PHPC, 16), 30),
    "region PHPC, 2 x 24 x 24": (lambda dtype: map_step(SMALL, dtype, PHPC, 8), 21),
    "region PHPC, samples": (
        lambda dtype: map_step(SMALL, dtype, PHPC, 8, num_classes=4, samples_per_class=20), 29,
    ),
    "region SupCon, num_classes": (lambda dtype: map_step(SMALL, dtype, SUPCON, 8, num_classes=4), 17),
    "region SupCon, 8 x 256 x 256": (lambda dtype: map_step(LARGE, dtype, SUPCON, 16), 23),
    "region SupCon, samples": (
        lambda dtype: map_step(SMALL, dtype, SUPCON, 8, num_classes=4, samples_per_class=20), 23,
    ),
    "SupCon, 512 vectors": (lambda dtype: vector_step(512, dtype), 15),
    "SupCon, 65 536 vectors": (lambda dtype: vector_step(65_536, dtype), 20),
    "SupCon, 512 vectors, form 'in'": (lambda dtype: vector_step(512, dtype, form="in"), 34),
    "SupCon, 512 vectors and 700 keys": (lambda dtype: vector_step(512, dtype, 700), 31),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_a_step(launches, name, dtype):
    make, most = STEPS[name]
    names = launches(make(dtype))
    assert len(names) <= most, " ".join(names)


# A merge of two runs doubles their length. There are 256 of them at most, which blocks of the first kernel make.
@pytest.mark.parametrize(
    ("shape", "num_classes", "most"),
    [
        (SMALL, 4, 5),
        (SMALL, None, 3),
        (LARGE, None, 11),
        pytest.param((12, 512, 512), None, 11, marks=pytest.mark.slow),
    ],
)
def test_plan_and_pack(launches, shape, num_classes, most):
    batch, *spatial = shape
    features, labels = torch.zeros(batch, 1, *spatial), choice([0, 1, 2, 3, 255], *shape)

    def plan():
        grid = Grid(batch, tuple(spatial), (8, 8))
        options = {"background": 0, "ignore_index": (255,), "num_classes": num_classes}
        pairs = partition(labels, grid, grid.num_regions(), **options)
        pack(features, pairs.order, pairs.live(), normalize=True, backend="triton")

    names = launches(plan)
    assert len(names) <= most, " ".join(names)


def table():
    """Launches of each step, by who launches them."""
    lines = ["| step | fp32 | fp16 | of fp16: torch, Triton, native |", "|---|---|---|---|"]
    with counting() as count:
        for name, (make, _) in STEPS.items():
            of_dtype = [count(make(dtype)) for dtype in (torch.float32, torch.float16)]
            by_owner = collections.Counter(
                "native" if one == "native" else "Triton" if one.endswith("_kernel") else "torch" for one in of_dtype[1]
            )
            owners = ", ".join(str(by_owner[owner]) for owner in ("torch", "Triton", "native"))
            lines.append(f"| {name} | {len(of_dtype[0])} | {len(of_dtype[1])} | {owners} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
