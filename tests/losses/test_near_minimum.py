"""Near its minimum a loss is no rounding error: fp32 within a few times what plain PyTorch makes of it."""

import pytest
import torch

from hpcloss import functional, reference
from hpcloss.backends.blockwise import tiles
from hpcloss.backends.pytorch import DENSE_UP_TO
from hpcloss.plan import native
from tests.tools import near_minimum
from tests.tools.near_minimum import CASES, SPREADS, TEMPERATURES, assert_near, features

SCHEDULES = ("one tile", "many tiles", "dense", "pieces", "dense, without the library")


@pytest.fixture(params=SCHEDULES)
def backend(request, monkeypatch):
    """What forward and backward compute twice must be equal to the last bit, whatever the tiles."""
    if request.param == "many tiles":
        monkeypatch.setattr(tiles, "BLOCK", 48)
        monkeypatch.setattr(tiles, "LONG_RUN", 12)
    if request.param == "pieces":
        monkeypatch.setitem(DENSE_UP_TO, "contrast", 0)
        return "auto"
    if request.param == "dense, without the library":
        monkeypatch.setattr(native, "serves", lambda tensor: False)
    return "dense" if request.param.startswith("dense") else "blockwise"


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, temperature, backend):
    for spread in SPREADS.values():
        assert_near(CASES[name], spread, temperature, backend=backend)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("name", ["NT-Xent", "SupCon, classes of 2", "SupCon, 16 classes", "RegionSupCon"])
def test_with_a_learnable_temperature(name, backend):
    """Then nothing bounds the logits, and all tiles are summed relative to the largest."""
    case = CASES[name]
    learnable = case._replace(loss=lambda z, t, **options: case.loss(z, torch.tensor(t), **options))
    for spread in SPREADS.values():
        assert_near(learnable, spread, 0.02, backend=backend)


def test_tiles_of_full_size(monkeypatch):
    monkeypatch.setattr(near_minimum, "ROWS", 1400)
    monkeypatch.setattr(near_minimum, "HALF", 700)
    for name in ("InfoNCE", "SupCon, classes of 2", "SupCon, other keys"):
        for spread in (0.3, 0.0):
            case = CASES[name]._replace(classes=700) if name != "SupCon, other keys" else CASES[name]
            assert_near(case, spread, 0.02)


def test_the_gradient_was_noise():
    """Positives near their anchors, temperature 0.02: the gradient was 30,000 times too large, the loss below 0."""
    z = features(64, 0.3).requires_grad_()
    loss = functional.ntxent_loss(z[:64], z[64:], 0.02)
    (grad,) = torch.autograd.grad(loss, z)
    assert 0 <= loss < 1e-9
    assert grad.norm() < 1e-9


@pytest.mark.parametrize("name", ["ntxent", "ihpc", "infonce", "hard_negative_nce"])
@pytest.mark.parametrize("count", [16, 600])
def test_small_losses_of_one_positive_are_exact_relative_to_themselves(name, count):
    """One view twice: losses near the rounding error of a logit, 1e-6, of which more than half of the digits are
    right."""
    z = torch.randn(count, 512, generator=torch.Generator().manual_seed(5))
    loss = getattr(functional, f"{name}_loss")(z, z, temperature=0.05)
    exact = getattr(reference, f"{name}_loss")(z.double(), z.double(), temperature=0.05)
    assert 0 < exact < 1e-5
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def test_rows_opposite_to_all_keys_at_a_small_temperature():
    """Their largest logit is -100 at temperature 0.01. Sums relative to it must not overflow."""
    x = torch.zeros(6, 4)
    x[:3, 0], x[3:, 0] = 1.0, -1.0
    keys, labels_of_keys = x[:3].clone(), torch.tensor([0, 1, 1])
    for dtype in (torch.float32, torch.float64):
        loss = functional.supcon_loss(
            x.to(dtype), torch.arange(6) % 2, keys.to(dtype), labels_of_keys, 0.01, reduction="none"
        )
        torch.testing.assert_close(loss, torch.full_like(loss, 3.0).log())
