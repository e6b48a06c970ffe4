"""The examples of docs/how_to/compile_and_graphs.md that need a GPU, as they stand on the page."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tools.documents import ON_A_GPU, blocks

PAGE = "docs/how_to/compile_and_graphs.md"
SHARED = blocks(PAGE)[0]
COMPILED, CAPTURED = [block for block in blocks(PAGE) if block.startswith(ON_A_GPU)]
STEPS = 5  # of either example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # What torch's own compiler does and torch itself warns of.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """None: a graph keeps the fills that it was captured with, and what is filled is not the example."""
    torch.use_deterministic_algorithms(False)


def executed(block):
    """The names of the page after its shared block and this one; only what it holds is run."""
    assert block.startswith(ON_A_GPU)
    names = {}
    for part in (SHARED, block):
        exec(compile(part, PAGE, "exec"), names)
    losses = torch.stack(names["losses"])
    assert losses.shape == (STEPS,) and losses.isfinite().all()
    assert losses.unique().numel() == STEPS, "steps on different data have different losses"
    return names


def eager(names, features, labels):
    """The loss and the gradients of the head as it is now."""
    parameters = list(names["head"].parameters())
    loss = names["step"](features, labels)
    return loss, *torch.autograd.grad(loss, parameters)


def test_compile_with_graphs():
    """Replays on new data give what the step gives, and nothing kept torch from capturing them."""
    torch._dynamo.reset()
    counters.clear()
    names = executed(COMPILED)
    assert counters["inductor"]["cudagraph_skips"] == 0
    for _ in range(2):
        features, labels = names["batch"]()
        loss = names["fast"](features, labels)
        loss.backward()
        found = [loss.detach().clone(), *(parameter.grad.clone() for parameter in names["head"].parameters())]
        names["optimiser"].zero_grad()
        for actual, right in zip(found, eager(names, features, labels), strict=True):
            torch.testing.assert_close(actual, right, rtol=2e-3, atol=1e-5)


def test_a_captured_graph():
    """Replays on new data give what the step gives, gradients included, and do not add to older ones."""
    names = executed(CAPTURED)
    for _ in range(2):
        for old, new in zip((names["features"], names["labels"]), names["batch"](), strict=True):
            old.copy_(new)
        names["graph"].replay()
        found = [names["captured_loss"].clone(), *(parameter.grad.clone() for parameter in names["head"].parameters())]
        for actual, right in zip(found, eager(names, names["features"], names["labels"]), strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-6)
