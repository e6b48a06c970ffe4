"""Every loss inside of what trainers use: autocast, GradScaler, torch.compile, activation checkpoints, CUDA graphs.

What `test_ops.py` asserts of the options of every loss (compiled without a graph break, autocast on the CPU) and
`test_modules.py` of copies and checkpoint files is not repeated.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hpcloss
from hpcloss.backends import pytorch
from tests.tools.losses import LOSSES, Sizes

# What torch's own compiler does and torch itself warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
]

CUDA = torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])
anywhere = pytest.mark.parametrize("device", ["cpu", GPU])
DRAWN = {"num_classes": 4, "samples_per_class": 3}
CALLS = {name: {} for name in LOSSES} | {
    f"{name}, sampled": DRAWN for name in ("region_phpc", "pixel_contrast", "local_contrast")
}


def batch(name, size, device="cpu", seed=0):
    """Images, or vectors, of which a network makes embeddings, and what else the loss takes."""
    sizes = Sizes(images=size, spatial=(6, 6), rows=size, dtype=torch.float32, seed=seed)
    return tuple(value.to(device) for value in LOSSES[name.split(",")[0]].inputs(sizes).values())


class Model(nn.Module):
    """A network of the first input, and its loss."""

    def __init__(self, name, device="cpu", **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))
        self.loss = LOSSES[name.split(",")[0]].build(**{**CALLS[name], **options})
        self.to(device)

    def network(self, x):
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x, *rest):
        return self.loss(self.network(x), *rest)


def step(model, call, inputs):
    """Value and gradients; samples are drawn alike."""
    torch.manual_seed(1)
    model.zero_grad()
    value = call(*inputs)
    value.backward()
    return value.detach(), *(parameter.grad.clone() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------- reduced precision


@anywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_leaves_the_loss_of_float32_rows_alone(name, dtype, device):
    loss, (x, *rest) = Model(name, device).loss, batch(name, 12, device)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, dtype, enabled=enabled):
            value = loss(leaf, *rest)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for plain, cast in zip(*found):
        assert cast.dtype == torch.float32 and cast.any() and torch.equal(plain, cast)


@anywhere
@pytest.mark.parametrize("name", CALLS)
def test_grad_scaler(name, device):
    """Scaling by a power of two changes no bit; a step that overflows is skipped and costs half of the scale."""
    models = Model(name, device), Model(name, device)
    optimisers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    for number, overflow in enumerate((False, True, False)):
        inputs = batch(name, 12, device, seed=number)
        if overflow:  # of one row, or image; of samples nobody knows which
            inputs[0][: None if "sampled" in name else 1] = torch.inf
        before = copy.deepcopy(models[1].state_dict())
        for model, optimiser, scaled in zip(models, optimisers, (False, True)):
            optimiser.zero_grad()
            torch.manual_seed(number)
            value = model(*inputs)
            (scaler.scale(value) if scaled else value).backward()
        if not overflow:
            optimisers[0].step()
        scaler.unscale_(optimisers[1])
        scaler.step(optimisers[1])
        scaler.update()
        same = all(torch.equal(value, before[key]) for key, value in models[1].state_dict().items())
        assert same == overflow and scaler.get_scale() == (2.0**12 if number == 0 else 2.0**11)
        for plain, scaled in zip(models[0].parameters(), models[1].parameters()):
            assert torch.equal(plain, scaled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_module_moved_to_a_dtype(name, dtype):
    """A learnt temperature goes with it, and so does a queue; the loss stays float32, or becomes float64."""
    extra = {"learnable": True} if name == "infonce" else {"temperature": 0.25}
    loss = LOSSES[name].build(**extra).to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in batch(name, 12)]
    exact = LOSSES[name].build(**extra).double()
    exact.load_state_dict(loss.state_dict())
    queues = [{}, {}]
    if name == "ihpc":
        queue = hpcloss.EmbeddingQueue(1, 20, 4).to(dtype)
        queue.enqueue(inputs[1].flip(0))
        queues = [{"queue": queue}, {"queue": copy.deepcopy(queue).double()}]
    for _ in range(2):
        x = inputs[0].clone().requires_grad_()
        value = loss(x, *inputs[1:], **queues[0])
        expected = exact(*[x.double() if x.is_floating_point() else x for x in inputs], **queues[1])
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0)
        value.backward()
        assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.any()


# --------------------------------------------------------------------------------------------- activation checkpoints


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_activation_checkpointing(name, reentrant):
    """Of the network, of the loss, of both: recomputed in the backward pass, samples too, for the same gradients."""
    model, (x, *rest) = Model(name), batch(name, 12)
    x.requires_grad_()  # what a reentrant checkpoint wants of its input

    def again(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    plain = step(model, model, (x, *rest))
    for call in (
        lambda x, *rest: model.loss(again(model.network, x), *rest),
        lambda x, *rest: again(model.loss, model.network(x), *rest),
        lambda x, *rest: again(model, x, *rest),
    ):
        for actual, expected in zip(step(model, call, (x, *rest)), plain):
            assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize("name", LOSSES)
def test_compile_twice_for_all_batch_sizes(name, monkeypatch):
    """One graph for the first batch, one for all others: no step of a training recompiles. Compiled code takes the
    tiles."""
    model, graphs = Model(name), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for size in (6, 9, 8, 11):
        inputs = batch(name, size, seed=size)
        found = step(model, compiled, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(pytorch, "choose", lambda *_: "blockwise")
            for actual, expected in zip(found, step(model, model, inputs)):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 2


# --------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_graph_of_a_training_step_replayed_on_new_data(name):
    """No loss waits for the device, so that a step with it can be captured; replays read the data of the day."""
    torch.use_deterministic_algorithms(False)
    model, inputs = Model(name, "cuda"), batch(name, 12, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            model(*inputs).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = model(*inputs)
        value.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for seed in (5, 6):
        fresh = batch(name, 12, "cuda", seed=seed)
        for old, new in zip(inputs, fresh):
            old.copy_(new)
        graph.replay()
        replayed = value.clone(), *(gradient.clone() for gradient in gradients)
        eager = copy.deepcopy(model)
        for actual, expected in zip(replayed, step(eager, eager, fresh)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
