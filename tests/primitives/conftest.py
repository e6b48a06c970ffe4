"""Fixtures of the primitives on the PyTorch backends."""

import pytest

from hpcloss.backends.blockwise import tiles
from hpcloss.backends.dense import batches
from tests.tools import plans

TILES = ("sliced", "sliced, tiny tiles", "static", "static, one tile")
DENSE = ("dense", "dense, few regions a batch", "dense, one region")


@pytest.fixture(params=TILES + DENSE)
def schedule(request, monkeypatch):
    """Tiles: the host-read slices of the CPU and the fixed masked tiles of devices, at sizes that make many tiles.

    Dense: the host-read regions of the CPU, in batches, and the one masked region of devices.
    """
    if request.param in DENSE:
        monkeypatch.setattr(plans, "BACKEND", "dense")
    if request.param == "dense, few regions a batch":
        monkeypatch.setattr(batches, "MOST", 40)
    if request.param == "dense, one region":
        monkeypatch.setattr(batches, "_reads", lambda at: False)
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
