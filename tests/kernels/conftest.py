"""Fixtures of the kernels."""

import pytest

from hpcloss.operators import load


@pytest.fixture(params=["tiny", "shipped"])
def blocks(request, monkeypatch):
    """Sizes at which few rows make sums, and sums of sums; and those of the package."""
    if request.param == "tiny":
        kernels = load("triton.segment_mean")
        monkeypatch.setattr(kernels, "BLOCK", 8)
        monkeypatch.setattr(kernels, "FEW", 16)
        monkeypatch.setattr(kernels, "ROWS", 32)
