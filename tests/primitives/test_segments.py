"""`segment_mean` on PyTorch tiles against its plain form, in float64. Its kernels: tests/kernels."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hpcloss.operators import load
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.segment_mean import segment_mean
from tests.tools.cases import rows
from tests.tools.numerics import assert_exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]

OPS = torch.ops.hpcloss
OFFSETS = {
    "some": [0, 3, 4, 9, 12],
    "empty ones": [0, 0, 5, 5, 5, 11, 12, 12],
    "rows outside": [2, 2, 5, 9],
    "one": [0, 12],
    "empty alone": [7, 7],
    "none": [4],
}


def plain(x, offsets):
    """Means by a loop."""
    offsets = offsets.tolist()
    parts = [x[first:last] for first, last in zip(offsets[:-1], offsets[1:], strict=True)]
    means = [part.sum(0) / max(len(part), 1) for part in parts]
    return torch.stack(means) if means else x[:0]


def mean(x, offsets):
    return segment_mean(Rows(x.detach(), x, "blockwise"), offsets)


@pytest.fixture(params=[True, False], ids=["on the CPU", "as elsewhere"])
def path(request, monkeypatch):
    """The path of other devices never reads the offsets; it runs on the CPU too."""
    if not request.param:
        monkeypatch.setattr(
            load("blockwise.segment_mean"), "_sums",
            lambda x, offsets, counts: torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True, initial=0.0),
        )  # fmt: skip


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_values_and_gradients(name, dtype, path):
    offsets, x = torch.tensor(OFFSETS[name], dtype=dtype), rows(12, 5).requires_grad_()
    actual, expected = mean(x, offsets), plain(x, offsets)
    assert_exact(actual, expected)
    upstream = rows(*actual.shape, seed=3)
    (grad,) = torch.autograd.grad(actual, x, upstream)
    (expected_grad,) = torch.autograd.grad(expected, x, upstream)
    assert_exact(grad, expected_grad)


def test_no_rows(path):
    x = rows(0, 5).requires_grad_()
    actual = mean(x, torch.tensor([0, 0, 0]))
    assert_exact(actual, torch.zeros(2, 5).double())
    actual.sum().backward()
    assert x.grad.shape == (0, 5)


def test_rows_outside_reach_nothing(path):
    x = rows(12, 5)
    x[:2], x[9:] = math.nan, math.inf
    offsets = torch.tensor(OFFSETS["rows outside"])
    assert_exact(mean(x.requires_grad_(), offsets), plain(x, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long_segments_lose_nothing(dtype):
    """Added one by one in fp32, 20 000 numbers around 1 would lose four digits."""
    x = (1 + rows(20_000, 3)).to(dtype)
    offsets = torch.tensor([5, 9_000, 9_001, 20_000])
    means = segment_mean(Rows(x, x, "blockwise"), offsets)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.double(), plain(x.double(), offsets), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("name", OFFSETS)
def test_gradcheck(name):
    offsets = torch.tensor(OFFSETS[name])
    assert gradcheck(lambda x: mean(x, offsets), (rows(12, 3).requires_grad_(),))


def test_backward_twice_raises():
    x = rows(12, 3).requires_grad_()
    (grad,) = torch.autograd.grad(mean(x, torch.tensor([0, 4, 12])).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_opcheck(dtype):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, offsets = rows(12, 3).to(dtype), torch.tensor([1, 4, 4, 10])
    torch.library.opcheck(OPS.segment_mean.default, (x, offsets, "blockwise"), test_utils=tests)
    grad = OPS.segment_mean(x, offsets, "blockwise")
    torch.library.opcheck(OPS.segment_mean_backward.default, (grad, offsets, 12), test_utils=tests)


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager", dynamic=True)
    for count, offsets in ((12, [0, 4, 12]), (17, [2, 2, 9, 11, 16])):
        results = []
        for function in (compiled, mean):
            x = rows(count, 3).requires_grad_()
            out = function(x, torch.tensor(offsets))
            out.square().sum().backward()
            results.append((out.detach(), x.grad))
        for actual, expected in zip(*results, strict=True):
            assert_exact(actual, expected)
