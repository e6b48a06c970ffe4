"""Two methods of the comparison, local contrast and PCCS: their parts, their training, and resuming after a kill."""

from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch

for package in ("monai", "lightning", "nibabel", "h5py", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from examples.data.folders import read_folder  # noqa: E402
from examples.data.splits import draw_split  # noqa: E402
from examples.methods.local_contrast import LocalContrast, pairs  # noqa: E402
from examples.methods.mean_teacher import Outputs  # noqa: E402
from examples.methods.pccs import PCCS, depths, entropy  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.training import quiet, train  # noqa: E402
from tests.tools.small_folders import write_msd  # noqa: E402

METHODS = [LocalContrast, PCCS]
SETTINGS = Settings(
    features=(8, 8, 8, 8, 8, 8), crop=(32, 32), augmentation="torch", labelled_batch=4, embedding_dim=16,
    confidence=0.4, checkpoint_every=3, validate_every=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return read_folder(write_msd(tmp_path_factory.mktemp("msd"), cases=8))


def make(kind, slices, settings=SETTINGS, **options):
    torch.manual_seed(0)
    stage = kind(slices, draw_split(slices, 2, None, 0), settings, 9, 0, **options)
    stage.log = stage.log_dict = lambda *args, **kwargs: None
    return stage


def outputs_of(stage, batch):
    with torch.no_grad():
        teacher = stage.teacher_tap(batch["weak"])
    return Outputs(*stage.student_tap(torch.cat([batch["images"], batch["strong"]])), *teacher)


# --------------------------------------------------------------------------------------------------------------- parts


def test_pairs_of_the_paper():
    """Four of each: the paper's ten pairs without those of its fifth images."""
    expected = [(0, 0), (1, 5), (2, 2), (3, 7), (4, 4), (4, 5), (6, 6), (6, 7)]
    assert [tuple(pair) for pair in pairs(4).tolist()] == expected
    assert pairs(1).tolist() == [[0, 0], [1, 1]]


def test_depths_are_distances_to_the_edge():
    labels = torch.zeros(2, 9, 9, dtype=torch.int64)
    labels[0, 2:7, 2:7] = 1
    labels[0, 4, 4] = 2
    labels[1] = 3
    found = depths(labels, 3)
    # A ring of 1, the next ring of 1 beside the hole that class 2 leaves, one pixel of 2, all at the edge.
    assert found[0, 2:7, 2:7].tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0] * 5]
    assert found[0, 0, 0] == 1 and found[0, 1, 4] == 0, "the background's half away from the classes"
    assert found[1].min() >= 0 and found[1].max() <= 2, "a class without edge has some depth"
    square = torch.zeros(1, 11, 11, dtype=torch.int64)
    square[0, 1:10, 1:10] = 1
    assert depths(square, 3)[0, 5].tolist()[1:10] == [0, 1, 2, 2, 2, 2, 2, 1, 0]
    assert depths(torch.zeros(1, 4, 4, dtype=torch.int64), 3).max() <= 1


def test_certain_background_has_no_prototype(slices):
    stage = make(PCCS, slices)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 2:6, 2:6] = 1
    probabilities = torch.full((1, 3, 8, 8), 0.01)
    probabilities.scatter_(1, labels[:, None], 0.98)
    found = stage.prototypes(torch.randn(1, 16, 8, 8), labels, probabilities)
    assert entropy(probabilities).max() < 0.25 and set(found.labels.tolist()) == {-1, 1}
    unsure = stage.prototypes(torch.randn(1, 16, 8, 8), labels, torch.full((1, 3, 8, 8), 1 / 3))
    assert set(unsure.labels.tolist()) == {-1, 0, 1}


def test_pseudo_labels_stay_for_a_round(slices, tmp_path):
    """The labeller is the averaged network of the round's first step, three times a stage."""
    quiet()
    stage = make(LocalContrast, slices)
    seen, taught = [], []
    step = stage.training_step

    def watch(self, batch, index):
        seen.append(self.labeller.final_conv.weight.detach().clone())
        taught.append(self.teacher.module.final_conv.weight.detach().clone())
        return step(batch, index)

    stage.training_step = MethodType(watch, stage)
    train(stage, tmp_path / "seed0" / "rounds", SETTINGS, "cpu")
    changed = [i for i in range(1, 9) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [3, 6] and all(torch.equal(seen[i], taught[i]) for i in (0, 3, 6))
    assert not torch.equal(seen[4], taught[4])


def test_unsure_pixels_have_no_pseudo_label(slices):
    """With no pixel sure, only pairs with labelled images are left."""
    stage = make(LocalContrast, slices)
    batch = stage.draw(np.random.RandomState(0))
    outputs = outputs_of(stage, batch)
    unsure = outputs._replace(teacher_logits=torch.zeros_like(outputs.teacher_logits))
    classes = torch.randint(len(slices.classes), outputs.teacher_logits[:, 0].shape)
    sure = outputs._replace(teacher_logits=20 * torch.nn.functional.one_hot(classes).movedim(-1, 1).float())

    def gradient(outputs):
        features = outputs.features.detach().requires_grad_()
        stage.unlabelled_loss(batch, outputs._replace(features=features)).backward()
        return features.grad.abs().flatten(1).sum(1)

    assert (gradient(unsure)[:4] > 0).all() and (gradient(unsure)[4:] == 0).all()
    assert (gradient(sure) > 0).all()


# ------------------------------------------------------------------------------------------------------------ training


def own_terms(stage, batch):
    """The method's own term and the whole loss, and what was logged."""
    logged = {}
    stage.log_dict = lambda values: logged.update({name: float(value.detach()) for name, value in values.items()})
    stage.log = lambda name, value: stage.log_dict({name: value})
    loss = stage.labelled_loss(batch, outputs := outputs_of(stage, batch)) + stage.unlabelled_loss(batch, outputs)
    return loss, logged


@pytest.mark.parametrize("kind", METHODS)
def test_its_own_term_falls(slices, kind, monkeypatch):
    """On one batch, at its own weight raised so that a few steps show it, by at least a fifth."""
    monkeypatch.setattr(kind, "progress", 1.0)
    stage = make(kind, slices, **({"weight": 1.0} if kind is LocalContrast else {"contrast_weight": 1.0}))
    batch = stage.draw(np.random.RandomState(0))
    optimiser = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 3e-3)
    terms = []
    for _ in range(40):
        torch.manual_seed(0)  # the same sampled pixels
        loss, logged = own_terms(stage, batch)
        terms.append(logged["method/contrast"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        stage.teacher.update_parameters(stage.network)
        if kind is PCCS:
            stage.after_step()
    assert terms[0] > 0 and terms[-1] < 0.8 * terms[0]


@pytest.mark.parametrize("kind", METHODS)
def test_its_gradient_reaches_encoder_and_heads(slices, kind, monkeypatch):
    """Of its own terms alone: the projector and the encoder; with the labels also the linear head."""
    monkeypatch.setattr(kind, "progress", 1.0)
    without = {"uncertainty_weight": 0.0} if kind is PCCS else {}
    stage = make(kind, slices, replace(SETTINGS, consistency_weight=0.0), **without)
    batch = stage.draw(np.random.RandomState(0))
    for _ in range(2):  # the bank holds something the second time
        stage.zero_grad()
        outputs = outputs_of(stage, batch)
        stage.unlabelled_loss(batch, outputs).backward()
    for name in ("network.conv_0.conv_0.conv.weight", "network.down_4.convs.conv_1.conv.weight",
                 "projector.layers.0.weight"):  # fmt: skip
        assert stage.get_parameter(name).grad.abs().sum() > 0, name
    stage.labelled_loss(batch, outputs_of(stage, batch)).backward()
    assert stage.network.final_conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_the_student_is_what_the_assignment_trains(slices, monkeypatch):
    """The published auxiliary loss has no gradient; here it falls, and the bank and the teacher's head follow."""
    monkeypatch.setattr(PCCS, "progress", 1.0)
    stage = make(PCCS, slices, assignment_weight=1.0)
    batch = stage.draw(np.random.RandomState(0))
    before = stage.teacher_projector.module.layers[0].weight.clone()
    optimiser = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 3e-3)
    terms = []
    for _ in range(40):
        loss, logged = own_terms(stage, batch)
        terms.append(logged["method/assignment"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        stage.after_step()
    assert terms[0] == 0, "an empty bank says nothing"
    assert terms[-1] < 0.8 * terms[1]
    assert stage.bank.filled.any(1).all() and not torch.equal(stage.teacher_projector.module.layers[0].weight, before)


def test_the_curriculum(slices, monkeypatch):
    """Labels alone, then consistency, then prototypes too."""
    stage = make(PCCS, slices)
    batch = stage.draw(np.random.RandomState(0))
    expected = [(0.005, set()), (0.02, {"uncertainty"}), (0.03, {"uncertainty", "contrast", "assignment"})]
    for progress, terms in expected:
        monkeypatch.setattr(PCCS, "progress", progress)
        _, logged = own_terms(stage, batch)
        assert {name.removeprefix("method/") for name in logged} - {"consistency"} == terms


@pytest.mark.parametrize("kind", METHODS)
def test_it_trains_and_resumes_to_the_same_weights(slices, tmp_path, kind):
    """Stopped in the middle, after a checkpoint, it ends as if it had not been."""
    quiet()

    def weights(name):
        return torch.load(tmp_path / "seed0" / name / "last.ckpt", weights_only=True)["state_dict"]

    def fresh():
        torch.manual_seed(0)
        return kind(slices, draw_split(slices, 2, None, 0), SETTINGS, 9, 0)

    done = train(fresh(), tmp_path / "seed0" / "whole", SETTINGS, "cpu")
    assert done["iterations"] == 9 and done["curve"][-1]["iteration"] == 9
    stage = fresh()

    def stop(self, batch, index):
        if self.trainer.global_step == 7:
            raise RuntimeError("stopped")
        return kind.training_step(self, batch, index)

    stage.training_step = MethodType(stop, stage)
    with pytest.raises(RuntimeError, match="stopped"):
        train(stage, tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    train(fresh(), tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    expected, found = weights("whole"), weights("stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    extra = {LocalContrast: {"labeller.final_conv.weight"}, PCCS: {"bank.prototypes", "bank.filled"}}
    assert extra[kind] <= set(found)
