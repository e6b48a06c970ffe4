"""The methods whose own term is a pixel contrast: they train, it falls, gradients arrive, runs resume."""

from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch

for package in ("monai", "lightning", "nibabel", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from examples.data.folders import read_folder  # noqa: E402
from examples.data.splits import draw_split  # noqa: E402
from examples.methods.entropy_guided import EntropyGuided  # noqa: E402
from examples.methods.multiscale import Multiscale  # noqa: E402
from examples.methods.region_contrast import RegionContrast  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.training import quiet, train  # noqa: E402
from tests.tools.small_folders import write_msd  # noqa: E402

METHODS = [EntropyGuided, Multiscale, RegionContrast]
SECOND = {EntropyGuided: "second_head", Multiscale: "second_decoder", RegionContrast: "projector"}
SETTINGS = Settings(
    features=(8, 8, 16, 32, 64, 8), crop=(32, 32), augmentation="torch", labelled_batch=2, checkpoint_every=2,
    validate_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return read_folder(write_msd(tmp_path_factory.mktemp("msd"), cases=8))


def make(kind, slices, iterations=9):
    torch.manual_seed(0)
    return kind(slices, draw_split(slices, 2, 2, 0), SETTINGS, iterations, 0)


@pytest.fixture
def fixed(slices, monkeypatch):
    """A stage with its terms in full, one batch for it, and what it logs."""

    def build(kind):
        logged, stage = {}, make(kind, slices)
        monkeypatch.setattr(kind, "progress", 1.0)
        monkeypatch.setattr(kind, "log", lambda self, name, value: logged.update({name: value}))
        monkeypatch.setattr(kind, "log_dict", lambda self, values: logged.update(values))
        return stage, stage.draw(np.random.RandomState(0)), logged

    return build


@pytest.mark.parametrize("kind", METHODS)
def test_its_own_term_falls(kind, fixed):
    stage, batch, logged = fixed(kind)
    optimiser = torch.optim.Adam(stage.parameter_groups(), 1e-2)
    terms = []
    for _ in range(40):
        optimiser.zero_grad()
        stage.training_step(batch, 0).backward()
        optimiser.step()
        terms.append(float(logged["method/contrast"].detach()))
    assert np.mean(terms[-5:]) < 0.8 * np.mean(terms[:2]), terms


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_reach_encoder_decoder_and_heads(kind, fixed):
    stage, batch, logged = fixed(kind)
    loss = stage.training_step(batch, 0)
    assert loss.isfinite()

    def reached(value):
        stage.zero_grad()
        value.backward(retain_graph=True)
        return {name for name, p in stage.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    of_contrast, of_loss = reached(logged["method/contrast"]), reached(loss)
    for part in ("network.conv_0", "network.down_4", "network.upcat_4", "network.upcat_1", "projector"):
        assert any(name.startswith(part) for name in of_contrast), part
    assert not any(name.startswith("network.final_conv") for name in of_contrast)
    for part in ("network.final_conv", SECOND[kind], "projector"):
        assert all(name in of_loss for name, _ in stage.named_parameters() if _ends_in_a_layer(name, part)), part
    assert not any(name.startswith("teacher") for name in of_loss)


def _ends_in_a_layer(name, part):
    """Weights under `part`; the biases before an InstanceNorm have no gradient by nature."""
    return name.startswith(part) and name.endswith("weight")


@pytest.mark.parametrize("kind", METHODS)
def test_unlabelled_images_matter(kind, fixed):
    """The ramped terms see them; labels alone do not."""
    stage, batch, logged = fixed(kind)
    stage.settings = replace(stage.settings, confidence=0.2)  # the teacher is untrained
    terms = []
    for images in (batch["strong"], batch["strong"].flip(0, 2)):
        torch.manual_seed(0)
        stage.training_step({**batch, "strong": images}, 0)
        terms.append(logged["method/contrast"].item())
    assert abs(terms[0] - terms[1]) > 1e-4


@pytest.mark.parametrize("kind", METHODS)
def test_it_trains_and_resumes_to_the_same_weights(kind, slices, tmp_path):
    quiet()
    whole = train(make(kind, slices), tmp_path / "seed0" / "whole", SETTINGS, "cpu")
    assert whole["iterations"] == 9 and whole["curve"][-1]["iteration"] == 9
    stage = make(kind, slices)

    def stop(self, batch, index):
        if self.trainer.global_step == 5:
            raise RuntimeError("stopped")
        return kind.training_step(self, batch, index)

    stage.training_step = MethodType(stop, stage)
    with pytest.raises(RuntimeError, match="stopped"):
        train(stage, tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    resumed = train(make(kind, slices), tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    assert resumed["curve"][-1]["dice"] == whole["curve"][-1]["dice"]
    expected, found = (
        torch.load(tmp_path / "seed0" / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "stopped")
    )
    assert any(name.startswith(SECOND[kind]) for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("iterations", range(1, 13))
def test_any_number_of_steps_has_a_schedule(iterations, slices):
    found = make(RegionContrast, slices, iterations).configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(iterations):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= SETTINGS.scratch_lr for rate in rates)


def test_the_second_decoder_starts_as_the_first(slices, tmp_path):
    """Also where the network's weights came after it was made: on the start of the training, not of a resumed one."""
    quiet()
    stage = make(Multiscale, slices, 1)
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.mul_(1.5)
    levels = [x.detach() for x in _levels(stage, torch.randn(2, 1, 32, 32))]
    expected = stage.network.final_conv(_decode(stage, levels))
    assert not torch.allclose(stage.second_decoder(levels)[0], expected)
    stage.training_step = MethodType(lambda self, batch, index: 0 * self.network.final_conv.weight.sum(), stage)
    stage.configure_optimizers = MethodType(lambda self: torch.optim.SGD(self.parameters(), 0.0), stage)
    train(stage, tmp_path / "seed0" / "start", SETTINGS, "cpu")
    assert torch.equal(stage.second_decoder(levels)[0], expected)


def _levels(stage, images):
    stage.dropout, stage.noise = 0.0, 0.0
    return stage.perturbed(images)


def _decode(stage, levels):
    network, (x0, x1, x2, x3, x4) = stage.network, levels
    return network.upcat_1(network.upcat_2(network.upcat_3(network.upcat_4(x4, x3), x2), x1), x0)


def test_perturbed_features_differ_and_unperturbed_ones_are_the_networks(slices):
    stage, images = make(Multiscale, slices), torch.randn(2, 1, 32, 32)
    first, second = stage.perturbed(images), stage.perturbed(images)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    assert not torch.allclose(first[-1], second[-1])
    levels = _levels(stage, images)
    torch.testing.assert_close(stage.network.final_conv(_decode(stage, levels)), stage.network(images))
