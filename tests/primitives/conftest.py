"""Fixtures of the primitives on PyTorch tiles."""

import pytest

from hpcloss.backends.blockwise import tiles


@pytest.fixture(params=["sliced", "sliced, tiny tiles", "static", "static, one tile"])
def schedule(request, monkeypatch):
    """The host-read slices of the CPU and the fixed masked tiles of devices, at sizes that make many tiles."""
    if request.param == "sliced, tiny tiles":
        monkeypatch.setattr(tiles, "BLOCK", 8)
        monkeypatch.setattr(tiles, "LONG_RUN", 4)
    if request.param.startswith("static"):
        monkeypatch.setattr(tiles, "STATIC_BLOCK", 7 if request.param == "static" else 1024)
        monkeypatch.setattr(
            tiles, "_schedule",
            lambda at, num_keys, rule, symmetric, _: tiles._static_schedule(at.pos_start.numel(), num_keys, symmetric),
        )  # fmt: skip
    return request.param
