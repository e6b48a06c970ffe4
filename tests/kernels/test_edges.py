"""Intervals that end anywhere in a tile, in tiles of several shapes."""

import pytest
import torch

from hpcloss.operators import load
from hpcloss.primitives.pair_lse import RULES
from tests.tools.kernels import needs_kernels
from tests.tools.problems import EDGES, Problem

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=lambda shape: "x".join(map(str, shape)))
def tile(request, monkeypatch):
    """Kernels in tiles of this shape, on a GPU too."""
    backend = load("triton")
    config = backend.configs.INTERPRETED._replace(block_i=request.param[0], block_j=request.param[1])
    monkeypatch.setattr(backend.configs, "config", lambda *_, **__: config)
    return request.param


@pytest.mark.parametrize("plan", EDGES)
def test_edges(plan, tile):
    problem = Problem(plan, torch.float32)
    for number, rule in enumerate(RULES):
        if tile == (16, 16) or rule in ("positives", "negatives"):
            problem.pair_lse(rule, 3.0, bound=(3.0, None)[number % 2])
    problem.pair_mean("own", 2.5, hardness=1.5, detach=False)
    if tile == (16, 16):
        problem.pair_mean("own", 2.5, bound=2.5, hardness=1.5, learnt=False)
        Problem(plan, torch.float16).pair_mean("logit", 2.5, bound=2.5, hardness=-2.0)
