"""Near its minimum a loss is no rounding error: fp32 within a few times what plain PyTorch makes of it."""

import near_minimum
import pytest
import torch
from near_minimum import CASES, SPREADS, TEMPERATURES, errors, features

from hpcloss import functional
from hpcloss.backends.blockwise import tiles


def assert_near(case, spread, temperature, **options):
    """The bar: the gradient is off by at most 10 times the error of plain PyTorch, plus 1e-3 of its norm."""
    found = errors(case, spread, temperature, **options)
    assert found.lowest >= 0
    assert found.our_gradient <= 10 * found.plain_gradient + 1e-3 * found.norm, found
    assert found.our_value <= 10 * found.plain_value + 1e-6 * max(found.value, 1), found


@pytest.fixture(params=["one tile", "many tiles"])
def tile_size(request, monkeypatch):
    """What forward and backward compute twice must be equal to the last bit, whatever the tiles."""
    if request.param == "many tiles":
        monkeypatch.setattr(tiles, "BLOCK", 48)
        monkeypatch.setattr(tiles, "LONG_RUN", 12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, temperature, tile_size):
    for spread in SPREADS.values():
        assert_near(CASES[name], spread, temperature)


@pytest.mark.parametrize("name", ["NT-Xent", "SupCon, 2 a class", "SupCon, 16 a class", "RegionSupCon"])
def test_with_a_learnable_temperature(name):
    """Then nothing bounds the logits, and all tiles are summed relative to the largest."""
    case = CASES[name]
    learnable = case._replace(loss=lambda z, t, **options: case.loss(z, torch.tensor(t), **options))
    for spread in SPREADS.values():
        assert_near(learnable, spread, 0.02)


def test_tiles_of_full_size(monkeypatch):
    monkeypatch.setattr(near_minimum, "ROWS", 1400)
    monkeypatch.setattr(near_minimum, "HALF", 700)
    for name in ("InfoNCE", "SupCon, 2 a class", "SupCon, other keys"):
        for spread in (0.3, 0.0):
            case = CASES[name]._replace(classes=700) if name != "SupCon, other keys" else CASES[name]
            assert_near(case, spread, 0.02)


def test_collapsed_vectors_of_the_issue_of_noise():
    """256 rows, positives near their anchors, temperature 0.02: the gradient was 30,000 times too large."""
    z = features(128, 0.3).requires_grad_()
    loss = functional.ntxent_loss(z[:128], z[128:], 0.02)
    (grad,) = torch.autograd.grad(loss, z)
    assert 0 <= loss < 1e-9
    assert grad.norm() < 1e-9
