"""What a step asks of a GPU, counted without one: operations of torch, kernels of Triton and of the native library."""

import functools
import importlib.util

import pytest
import torch
from cases import choice, cuda_on_cpu, implementations, rows
from kernels import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

import hpcloss
from hpcloss import native
from hpcloss.functional import region, supcon
from hpcloss.pack import pack
from hpcloss.partition import partition
from hpcloss.regions import Grid

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(INTERPRETED, reason="in the interpreter kernels copy their arguments"),
]
# What launches nothing, besides views: memory, and numbers that stay on the host. The rest launches one kernel each.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor"}
OPERATORS = ("pack", "pack_backward", "pair_lse", "pair_lse_backward", "pair_mean", "pair_mean_backward")
NATIVE = ("class_sort", "class_intervals", "pair_counts", "sample")


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


@pytest.fixture(scope="module")
def cuda():
    yield from implementations("cuda")


@pytest.fixture
def launches(cuda, monkeypatch):
    """Calls a function as on a GPU and names what it launches; what kernels would compute is missing."""
    import offline

    from hpcloss.backends import triton as backend

    for module in (region, supcon):
        monkeypatch.setattr(module, "resolve", lambda name, tensor: "triton")
    mode = Operations()

    def seen_inside(function):
        @functools.wraps(function)
        def inside(*args, **kwargs):
            with mode:  # an operator switches it off for its body
                return function(*args, **kwargs)

        return inside

    def count(function):
        for owner, names in ((backend, OPERATORS), (native, NATIVE)):
            for name in names:
                monkeypatch.setattr(owner, name, seen_inside(getattr(owner, name)))
        library = cuda_on_cpu()
        before = library.hpcloss_emulator_launches()
        with offline.recorded(90) as kernels, mode:
            function()
        native_kernels = library.hpcloss_emulator_launches() - before
        names = mode.names + [launch.kernel.__name__ for launch in kernels] + ["native"] * native_kernels
        assert len(kernels) > 0 and native_kernels > 0
        return names

    return count


def step(dtype, **options):
    """Forward and backward of a loss on inputs that are there already."""
    features = rows(2, 16, 24, 24, dtype=torch.float32).to(dtype).requires_grad_()
    labels, loss = choice([0, 1, 2, 3, 255], 2, 24, 24), hpcloss.RegionPHPCLoss(8, num_classes=4, **options)
    return lambda: torch.autograd.grad(loss(features, labels), features)


# fp16 adds one kernel to each backward pass: the largest gradient, by which slopes are lifted.
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 25), (torch.float16, 27)])
def test_a_step(launches, dtype, most):
    names = launches(step(dtype))
    assert len(names) <= most, " ".join(names)


def test_a_sampled_step(launches):
    names = launches(step(torch.float32, samples_per_class=20))
    assert len(names) <= 31, " ".join(names)


def test_plan_and_pack(launches):
    features, labels = rows(2, 16, 24, 24, dtype=torch.float32), choice([0, 1, 2, 3, 255], 2, 24, 24)

    def plan():
        pairs = partition(labels, Grid(2, (24, 24), (8, 8)), background=0, ignore_index=(255,), num_classes=4)
        pack(features, pairs.order, pairs.live(), normalize=True, backend="triton")

    names = launches(plan)
    assert len(names) <= 6, " ".join(names)
