"""The search for tile shapes, without a GPU: each kernel is run in the shape that is timed, with its registers."""

import itertools

import pytest
import torch

from tests.tools.kernels import compile_or_skip

compile_or_skip()
from benchmarks import tune  # noqa: E402
from hpcloss.backends.triton import configs  # noqa: E402
from tests.tools import offline  # noqa: E402

# How often the call that is timed launches the kernel: the backward pass is that of two primitives.
LAUNCHES = {"backward": 2}


def test_every_kernel_with_shapes_is_searched():
    named = {kernel for part in configs.CONFIGS.values() for shapes in part.values() for kernel in shapes}
    assert set(tune.KERNELS) == named | set(configs.SAME_AS)
    assert {"pair_lse", "pair_mean", "pair_cross_entropy", "backward", "cross_entropy_backward"} <= set(tune.KERNELS)


@pytest.mark.parametrize("capability", sorted(offline.SHARED_LIMIT))
@pytest.mark.parametrize(
    "dtype, precision", [(torch.float16, "half"), (torch.float32, "tf32"), (torch.float32, "ieee")]
)
def test_every_kernel_has_a_shape_on_every_part(capability, dtype, precision, monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: capability)
    monkeypatch.setattr(configs, "precision", lambda rows: precision)
    for kernel, width in itertools.product(tune.KERNELS, configs.WIDTHS):
        assert isinstance(configs.config(kernel, torch.zeros(2, width, dtype=dtype)), configs.Config)


@pytest.mark.parametrize("maxnreg", [None, 128])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_a_kernel_is_launched_in_the_shape_that_is_timed(kernel, maxnreg):
    shape = configs.Config(64, 16, 4, 1, maxnreg)
    rows = torch.nn.functional.normalize(torch.randn(40, 64), dim=1).half()
    with offline.recorded(90) as launches:
        call = tune.work(kernel, rows)
        launches.clear()
        with tune.run_in(kernel, shape):
            call()
        given = [{**launch.constants, **launch.options} for launch in launches]
        some = [x for x in given if (x.get("BLOCK_I"), x.get("BLOCK_J")) == shape[:2]]
        assert len(some) == LAUNCHES.get(kernel, 1)
        assert all((x["num_warps"], x["num_stages"], x.get("maxnreg")) == shape[2:] for x in some)
        launches.clear()
        call()
        assert not any((x.constants.get("BLOCK_I"), x.constants.get("BLOCK_J")) == shape[:2] for x in launches)


def test_the_fastest_shapes_are_tried_with_fewer_registers():
    """By made-up times; what does not compile is no candidate."""
    asked = []

    def time(call):
        shape = tune.configs.config("pair_lse", None)
        asked.append(shape)
        if shape.block_j == 128:
            raise RuntimeError("out of resource: shared memory")
        return shape.block_i + shape.block_j / 1000 + shape.num_warps / 100 + (0.5 if shape.maxnreg else 0.0)

    times = tune.search("pair_lse", lambda: None, time)
    free = [shape for shape in asked if shape.maxnreg is None]
    assert free == list(tune.shapes()) and set(times) == {shape for shape in asked if shape.block_j != 128}
    limited = [shape for shape in asked if shape.maxnreg is not None]
    finalists = sorted((shape for shape in times if shape.maxnreg is None), key=times.__getitem__)[: tune.FINALISTS]
    assert {shape._replace(maxnreg=None) for shape in limited} == set(finalists)
    assert {shape.maxnreg for shape in tune.with_fewer_registers(configs.Config(128, 64, 8, 3))} == {128}
    assert {shape.maxnreg for shape in tune.with_fewer_registers(configs.Config(64, 64, 4, 3))} == {168, 128}


def test_shapes_are_written_as_the_table_has_them():
    assert tune.written(configs.Config(128, 64, 8, 3)) == "Config(128, 64, 8, 3)"
    assert tune.written(configs.Config(128, 64, 8, 3, 128)) == "Config(128, 64, 8, 3, 128)"
