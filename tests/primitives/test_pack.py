"""Gathering and normalising: values, Jacobian, strides, and what a dead row must never let through."""

import pytest
import torch

from hpcloss.operators import NORM_EPS
from hpcloss.primitives.rows import Rows, pack
from tests.tools.cases import integers, rows
from tests.tools.numerics import assert_exact

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
}


def plain(features, order, live, normalize):
    """The rows one after the other."""
    pixels = features.movedim(1, -1).reshape(-1, features.shape[1])
    packed = []
    for row, pixel in enumerate(order.tolist()):
        x = pixels[pixel]
        if row >= live:
            x = torch.zeros_like(x)
        elif normalize:
            norm = x.detach().norm()
            x = x / x.norm() if norm > NORM_EPS else torch.zeros_like(x)
        packed.append(x)
    return torch.stack(packed)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 4, 3, 5), (2, 3, 2, 3, 4), (12, 6), (1, 1, 1, 1)])
def test_rows_and_gradients(shape, layout, normalize):
    features = LAYOUTS[layout](rows(*shape)).detach().requires_grad_()
    count = features.numel() // shape[1]
    order = torch.randperm(count, dtype=torch.int32)
    live = torch.tensor([max(count - 2, 1)])
    packed = pack(features, order, live, normalize=normalize, backend="blockwise")
    expected = plain(features, order, int(live), normalize)
    assert_exact(packed.data, expected.detach())
    assert not packed.data.requires_grad and packed.companion.requires_grad and packed.companion.stride() == (0, 0)
    upstream = rows(count, shape[1], seed=3)
    (grad,) = torch.autograd.grad(packed.companion, features, upstream)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    assert_exact(grad, expected_grad, floor=1e-15)  # a single channel: the direction cannot change
    assert grad.shape == features.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_the_gradient_has_the_layout_of_the_features(layout):
    features = LAYOUTS[layout](rows(2, 4, 3, 5, dtype=torch.float32)).detach().requires_grad_()
    packed = pack(features, torch.arange(30), normalize=True, backend="blockwise")
    (grad,) = torch.autograd.grad(packed.companion.sum(), features)
    assert grad.stride() == features.stride()


def test_an_expanded_leaf():
    features = rows(1, 4, 1, 5).expand(3, 4, 2, 5).detach().requires_grad_()
    packed = pack(features, torch.arange(30), normalize=True, backend="blockwise")
    upstream = rows(30, 4, seed=3)
    (grad,) = torch.autograd.grad(packed.companion, features, upstream)
    (expected,) = torch.autograd.grad(plain(features, torch.arange(30), 30, True), features, upstream)
    assert_exact(grad, expected)


def test_a_part_of_the_pixels_and_repeated_dead_rows():
    """A sample names some pixels; its dead tail names pixel 0 again and again."""
    features = rows(2, 4, 3, 5).requires_grad_()
    order, live = torch.tensor([7, 0, 29, 0, 0, 0]), torch.tensor(3)
    packed = pack(features, order, live, normalize=True, backend="blockwise")
    expected = plain(features, order, 3, True)
    assert_exact(packed.data, expected.detach())
    upstream = rows(6, 4, seed=3)
    (grad,) = torch.autograd.grad(packed.companion, features, upstream)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    assert_exact(grad, expected_grad)
    assert grad.movedim(1, -1).reshape(-1, 4).abs().sum(1).count_nonzero() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_far_from_one(dtype):
    features = torch.zeros(5, 4, dtype=dtype)
    features[0] = torch.tensor([3e30, 0, 4e30, 0])  # the square overflows fp32
    features[1] = torch.tensor([3e-9, 0, 4e-9, 0])  # the square is below 1e-17
    features[2] = torch.tensor([3e-30, 0, 4e-30, 0])  # no direction
    features[4] = torch.tensor([0, 0, -1.1e-12, 0])
    features.requires_grad_()
    packed = pack(features, torch.arange(5), normalize=True, backend="blockwise")
    unit = torch.tensor([0.6, 0, 0.8, 0], dtype=dtype)
    zero = torch.zeros(4, dtype=dtype)
    expected = torch.stack([unit, unit, zero, zero, torch.tensor([0, 0, -1.0, 0], dtype=dtype)])
    torch.testing.assert_close(packed.data, expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(packed.companion.sum(), features)
    assert (grad[2:4] == 0).all() and grad.isfinite().all()
    tangent = torch.ones(4, dtype=dtype) - unit * 1.4
    torch.testing.assert_close(grad[0], tangent / 5e30, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[1], tangent / 5e-9, rtol=1e-5, atol=0)


def test_half_precision_norms():
    """fp16 squares overflow at 256 and vanish below 2e-4."""
    features = torch.tensor([[3e4, 4e4], [3e-6, 4e-6], [6e-8, 0.0]], dtype=torch.float16)
    packed = pack(features, torch.arange(3), normalize=True, backend="blockwise")
    exact = torch.nn.functional.normalize(features.double(), dim=1)
    torch.testing.assert_close(packed.data.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dead_rows_let_nothing_through(poison, normalize):
    features = rows(6, 4)
    features[2] = features[5] = poison
    features.requires_grad_()
    order, live = torch.tensor([0, 1, 3, 4, 2, 5]), torch.tensor([4])
    packed = pack(features, order, live, normalize=normalize, backend="blockwise")
    assert (packed.data[4:] == 0).all() and packed.data.isfinite().all()
    (grad,) = torch.autograd.grad(packed.companion, features, rows(6, 4, seed=3))
    assert grad.isfinite().all() and (grad[[2, 5]] == 0).all() and (grad[[0, 1, 3, 4]] != 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_live_rows_do_not_hide_a_nan(normalize):
    features = rows(3, 4)
    features[1, 2] = float("nan")
    packed = pack(features, torch.arange(3), normalize=normalize, backend="blockwise")
    assert packed.data[1].isnan().any() and packed.data[[0, 2]].isfinite().all()


def test_dtypes():
    for dtype, wanted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                          (torch.float32, torch.float32), (torch.float64, torch.float64)):  # fmt: skip
        features = rows(6, 4, dtype=dtype).requires_grad_()
        packed = pack(features, torch.arange(6), normalize=True, backend="blockwise")
        assert packed.data.dtype == packed.companion.dtype == wanted
        (grad,) = torch.autograd.grad(packed.companion.sum(), features)
        assert grad.dtype == dtype
        exact = torch.nn.functional.normalize(features.detach().double(), dim=1)
        torch.testing.assert_close(packed.data.double(), exact, rtol=1e-6, atol=1e-7)


def test_detached_rows():
    packed = pack(rows(6, 4).requires_grad_(), torch.arange(6), normalize=True, backend="blockwise").detach()
    assert isinstance(packed, Rows) and not packed.companion.requires_grad


def test_gradients_below_the_smallest_half_arrive_in_fp32():
    features = rows(8, 4, dtype=torch.float16).requires_grad_()
    packed = pack(features, torch.arange(8), normalize=False, backend="blockwise")
    seen = []
    packed.companion.register_hook(seen.append)
    (packed.companion.double() * 1e-9).sum().backward()
    assert seen[0].dtype == torch.float32 and (seen[0] == torch.tensor(1e-9)).all()


def test_many_rows():
    """More rows than any piece in which they may be worked off."""
    count = 70_000
    features = rows(1, 3, count, dtype=torch.float32).requires_grad_()
    order = torch.randperm(count)
    packed = pack(features, order, torch.tensor(count - 7), normalize=True, backend="blockwise")
    upstream = integers(5, count, 3).float()
    (grad,) = torch.autograd.grad(packed.companion, features, upstream)
    x = features.detach()[0].T.double()[order]
    unit = x / x.norm(dim=1, keepdim=True)
    alive = (torch.arange(count) < count - 7)[:, None]
    torch.testing.assert_close(packed.data.double(), unit * alive, rtol=1e-5, atol=1e-6)
    expected = (upstream - unit * (unit * upstream).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True) * alive
    torch.testing.assert_close(grad[0].T[order].double(), expected, rtol=1e-4, atol=1e-4)
