"""ProjectionHead and FeatureTap."""

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from hpcloss.heads import FeatureTap, ProjectionHead

# ---- ProjectionHead ----


@pytest.mark.parametrize("spatial_dims", [0, 1, 2, 3])
def test_projection_is_two_matrices_and_a_relu_per_pixel(spatial_dims):
    torch.manual_seed(0)
    head = ProjectionHead(5, dim=4, hidden=7, spatial_dims=spatial_dims).double()
    x = torch.randn(2, 5, *(3, 2, 4)[:spatial_dims], dtype=torch.float64)
    z = head(x)
    assert z.shape == (2, 4, *x.shape[2:])
    w1, b1, w2, b2 = head.parameters()
    pixels = x.movedim(1, -1)
    expected = torch.relu(pixels @ w1.reshape(7, 5).T + b1) @ w2.reshape(4, 7).T + b2
    torch.testing.assert_close(z.movedim(1, -1), expected)


def test_projection_defaults():
    head = ProjectionHead(6)
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 6, 1, 1), (6,), (128, 6, 1, 1), (128,)]
    x = torch.randn(1, 6, 1, 1)
    assert torch.equal(head.train()(x), head.eval()(x))  # one pixel is enough, in either mode
    assert not torch.allclose(head(3 * x).norm(dim=1), torch.ones(()))  # not normalised


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"in_channels": 4, "dim": -1}, "dim must be at least 1, got -1"),
        ({"in_channels": 4, "hidden": 0}, "hidden must be at least 1, got 0"),
        ({"in_channels": 4, "spatial_dims": 4}, "spatial_dims must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_projection_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProjectionHead(**arguments)


@pytest.mark.parametrize(("spatial_dims", "shape"), [(0, (5, 6)), (2, (2, 6, 4, 4)), (3, (2, 6, 4, 4, 4))])
def test_projection_of_features_with_other_channels(spatial_dims, shape):
    with pytest.raises(ValueError, match="features must have in_channels=8 channels, got 6"):
        ProjectionHead(8, spatial_dims=spatial_dims)(torch.randn(shape))


def test_projection_of_features_with_other_axes():
    """For one axis less torch would take the batch for channels, and say nothing where there are as many."""
    for spatial_dims, shape in ((3, (8, 8, 4, 4)), (2, (8, 4, 4)), (1, (8, 4)), (2, (2, 8, 4, 4, 4))):
        axes = ", ".join("DHW"[-spatial_dims:])
        message = f"spatial_dims={spatial_dims} needs features [B, C, {axes}], got {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ProjectionHead(8, spatial_dims=spatial_dims)(torch.randn(shape))


# ---- FeatureTap ----


class Network(nn.Module):
    """A small segmentation network; with `reentrant` its encoder runs under activation checkpointing of that kind."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.decoder = nn.ModuleDict({"up": nn.Conv2d(4, 5, 1)})
        self.classifier = nn.Conv2d(5, 2, 1)
        self.unused = nn.Identity()
        self.reentrant = reentrant

    def forward(self, x, scale=1.0):
        h = self.encoder(x) if self.reentrant is None else checkpoint(self.encoder, x, use_reentrant=self.reentrant)
        return scale * self.classifier(self.decoder["up"](h))


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def network(**arguments):
    torch.manual_seed(0)
    return Network(**arguments)


def leftovers(model):
    """Tensors that a tap left on the model's layers."""
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name.startswith("_tapped_output") and value is not None
    ]


def test_returns_output_and_features(x):
    plain, tapped = network().eval(), FeatureTap(network().eval(), "decoder.up")
    output, features = tapped(x)
    h = plain.encoder(x)
    assert torch.equal(features, plain.decoder["up"](h))
    assert torch.equal(output, plain(x))
    assert torch.equal(tapped(x, scale=2.0)[0], plain(x, 2.0))
    assert leftovers(tapped) == []
    assert "layer='decoder.up'" in repr(tapped)


def test_features_are_joined_to_the_graph(x):
    tapped = FeatureTap(network(), "encoder.1")
    _, features = tapped(x)
    features.square().sum().backward()
    assert tapped.model.encoder[0].weight.grad.abs().sum() > 0
    assert tapped.model.classifier.weight.grad is None


def test_features_belong_to_the_call(x):
    tapped = FeatureTap(network().eval(), "encoder")
    first, second = tapped(x)[1], tapped(x + 1)[1]
    assert torch.equal(first, tapped.model.encoder(x))
    assert torch.equal(second, tapped.model.encoder(x + 1))


def test_train_and_eval_reach_the_network(x):
    tapped = FeatureTap(network(), "encoder.1")
    assert tapped.model.training
    torch.testing.assert_close(tapped(x)[1].mean((0, 2, 3)), torch.zeros(4), atol=1e-6, rtol=0)  # batch statistics
    tapped.eval()
    assert not tapped.model.encoder[1].training
    assert torch.equal(tapped(x)[1], tapped.model.encoder[:2](x))


def test_dtype_under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        assert FeatureTap(network(), "decoder.up")(x)[1].dtype == torch.bfloat16


class Twice(nn.Module):
    def __init__(self, times=2):
        super().__init__()
        self.layer, self.times = nn.Linear(3, 3), times
        self.same = self.layer  # a second name of the same layer

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x)
        return {"out": x.sum(), "last": x}


@pytest.mark.parametrize("name", ["layer", "same"])
def test_last_run_of_a_layer_counts(name):
    tapped = FeatureTap(Twice(), name)
    output, features = tapped(torch.randn(2, 3))
    assert features is output["last"]  # outputs of any type are handed through


def test_parameters_and_tuples_as_features():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 3))

        def forward(self):
            return self.table

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.prototypes, self.lstm = Prototypes(), nn.LSTM(3, 4)

        def forward(self, x):
            return self.lstm(x)[0] + self.prototypes().sum()

    model = Model()
    keys = list(model.state_dict())
    assert FeatureTap(model, "prototypes")(torch.randn(2, 3))[1] is model.prototypes.table
    _, (hidden, _) = FeatureTap(model, "lstm")(torch.randn(2, 3))
    assert hidden.shape == (2, 4)
    assert list(model.state_dict()) == keys


def test_state_dict(x):
    plain, tapped = network(), FeatureTap(network(), "decoder.up")
    assert list(tapped.state_dict()) == ["model." + key for key in plain.state_dict()]
    assert [n for n, _ in tapped.named_parameters()] == ["model." + n for n, _ in plain.named_parameters()]
    nn.init.zeros_(tapped.model.classifier.weight)
    tapped(x)  # running leaves no trace in it
    plain.load_state_dict(tapped.model.state_dict())
    other = FeatureTap(network(), "encoder")
    other.load_state_dict(tapped.state_dict())
    assert torch.equal(other.model.classifier.weight, plain.classifier.weight)


def test_the_bare_network_keeps_nothing(x):
    tapped = FeatureTap(network(), "decoder.up")
    assert isinstance(tapped.model(x), torch.Tensor)
    assert leftovers(tapped) == []


def test_several_taps(x):
    model = network().eval()
    one, other, same = FeatureTap(model, "encoder"), FeatureTap(model, "decoder.up"), FeatureTap(model, "encoder")
    assert torch.equal(one(x)[1], model.encoder(x))
    assert torch.equal(other(x)[1], model.decoder["up"](model.encoder(x)))
    assert torch.equal(same(x)[1], model.encoder(x))
    nested = FeatureTap(FeatureTap(model, "encoder"), "model.encoder")
    (output, inner), outer = nested(x)
    assert inner is outer and torch.equal(output, model(x))


def test_copies_are_independent(x):
    tapped = FeatureTap(network().eval(), "decoder.up")
    tapped(x)[1].sum().backward()
    twin = copy.deepcopy(tapped)
    nn.init.zeros_(twin.model.decoder["up"].weight)
    nn.init.ones_(twin.model.decoder["up"].bias)
    assert torch.equal(twin(x)[1], torch.ones(2, 5, 4, 4))
    assert torch.equal(tapped(x)[1], tapped.model.decoder["up"](tapped.model.encoder(x)))
    # also a copy of the network alone, tapped anew
    again = FeatureTap(copy.deepcopy(tapped.model), "decoder.up")
    assert torch.equal(again(x)[1], tapped(x)[1])


def test_pickles(x, tmp_path):
    tapped = FeatureTap(network().eval(), "decoder.up")
    expected = tapped(x)
    torch.save(tapped, tmp_path / "tapped.pt")
    for twin in (pickle.loads(pickle.dumps(tapped)), torch.load(tmp_path / "tapped.pt", weights_only=False)):
        assert all(map(torch.equal, twin(x), expected))


def test_replicas_in_threads(x):
    """What nn.DataParallel does: shallow replicas, which share their hooks, called at the same time."""

    class Meet(nn.Module):  # lets no thread go on before the other has run the tapped layer
        def __init__(self, barrier):
            super().__init__()
            self.barrier = barrier

        def forward(self, x):
            self.barrier.wait(10)
            return x

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, value in module._parameters.items():
            setattr(replica, name, value)
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        return replica

    tapped = FeatureTap(nn.Sequential(nn.Conv2d(3, 4, 1), Meet(threading.Barrier(2)), nn.ReLU()), "0")
    found = {}

    def call(number):
        found[number] = replicas[number](x + number)[1]

    replicas = [replicate(tapped) for _ in range(2)]
    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert torch.equal(found[number], tapped.model[0](x + number))


def test_compiles_in_one_graph(x):
    torch._dynamo.reset()
    tapped = FeatureTap(network().eval(), "decoder.up")
    counter = CompileCounter()
    compiled = torch.compile(tapped, fullgraph=True, backend=counter)
    for step in range(3):
        assert all(map(torch.equal, compiled(x + step), tapped(x + step)))
    assert counter.frame_count == 1
    compiled(x)[1].sum().backward()
    assert tapped.model.encoder[0].weight.grad is not None
    assert leftovers(tapped) == []


def test_activation_checkpointing(x):
    plain, tapped = FeatureTap(network(), "encoder.0"), FeatureTap(network(reentrant=False), "encoder.0")
    for model in (plain, tapped):
        output, features = model(x)
        (output.square().sum() + features.square().sum()).backward()
    for got, expected in zip(tapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert leftovers(tapped) == []  # the layer ran again in the backward pass
    assert not FeatureTap(network(reentrant=True), "encoder.0")(x.requires_grad_())[1].requires_grad  # as documented


def test_unknown_layer():
    with pytest.raises(ValueError, match=r"no layer 'decoder.pu'; it has decoder.up, .*classifier"):
        FeatureTap(network(), "decoder.pu")
    with pytest.raises(ValueError, match="no layer ''; it has encoder, encoder.0"):
        FeatureTap(network(), "")
    with pytest.raises(ValueError, match="no layer 'x'; it has none"):
        FeatureTap(nn.Linear(2, 2), "x")
    with pytest.raises(ValueError, match=r", 48, 49 and 30 more$"):
        FeatureTap(nn.Sequential(*(nn.Identity() for _ in range(80))), "encoder")


def test_layer_that_does_not_run(x):
    tapped = FeatureTap(network(), "unused")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="layer 'unused' did not run in this call of Network"):
            tapped(x)
    stale = FeatureTap(Twice(), "layer")
    stale(torch.randn(2, 3))
    stale.model.times = 0  # nothing of the last call is returned
    with pytest.raises(RuntimeError, match="did not run"):
        stale(torch.randn(2, 3))


def test_an_error_in_the_network_leaves_nothing_behind(x):
    tapped = FeatureTap(network(), "encoder")
    with pytest.raises(TypeError):
        tapped(x, scale=object())
    assert leftovers(tapped) == []
    assert tapped(x)[1].shape == (2, 4, 4, 4)
