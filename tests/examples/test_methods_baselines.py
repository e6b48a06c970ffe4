"""The semi-supervised baselines and the contrast as a further term: their equations, what learns, resumed runs."""

from dataclasses import replace
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for package in ("monai", "lightning", "nibabel", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from examples.data.folders import read_folder  # noqa: E402
from examples.data.splits import draw_split  # noqa: E402
from examples.methods.contrast_term import ContrastTerm  # noqa: E402
from examples.methods.copy_paste import CopyPaste, rectangle  # noqa: E402
from examples.methods.cross_pseudo import CrossPseudo  # noqa: E402
from examples.methods.fixmatch import FixMatch, confident_cross_entropy  # noqa: E402
from examples.methods.mean_teacher import IGNORED  # noqa: E402
from examples.methods.unimatch import UniMatch, channel_dropout, mix, random_boxes  # noqa: E402
from examples.networks import DECODER, HEAD  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.training import quiet, train  # noqa: E402
from tests.tools.small_folders import write_msd  # noqa: E402

KINDS = {
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "cross-pseudo": CrossPseudo,
    "copy-paste": CopyPaste,
    "contrast": ContrastTerm,
    "contrast, memory": partial(ContrastTerm, memory=True, layer="upcat_3", samples=16),
    "contrast, hard pixels": partial(ContrastTerm, hard=True, head_lr=8.0),
    "contrast, published": partial(ContrastTerm, hardness="published", layer="upcat_1", samples=None),
}
SETTINGS = Settings(
    features=(8, 8, 16, 32, 64, 8), crop=(32, 32), augmentation="torch", labelled_batch=2, checkpoint_every=2,
    validate_every=4, confidence=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return read_folder(write_msd(tmp_path_factory.mktemp("msd"), cases=8))


def make(kind, slices, iterations=9, **settings):
    torch.manual_seed(0)
    return kind(slices, draw_split(slices, 2, 2, 0), replace(SETTINGS, **settings), iterations, 0)


@pytest.fixture
def ready(slices, monkeypatch):
    """A stage with its terms in full, one batch for it, and what it logs."""

    def build(kind, **settings):
        stage, logged = make(kind, slices, **settings), {}
        monkeypatch.setattr(type(stage), "progress", 1.0)
        monkeypatch.setattr(type(stage), "log", lambda self, name, value: logged.update({name: value}))
        monkeypatch.setattr(type(stage), "log_dict", lambda self, values: logged.update(values))
        return stage, stage.draw(np.random.RandomState(0)), logged

    return build


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_one_batch(name, ready):
    stage, batch, logged = ready(KINDS[name])
    optimiser = torch.optim.Adam(stage.parameter_groups(), 1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = stage.training_step(batch, 0)
        loss.backward()
        optimiser.step()
        stage.after_step()
        losses.append(float(logged["method/labelled"].detach()))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2]), losses


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_a_function_of_the_draw(name, slices):
    stage = make(KINDS[name], slices)
    first, again, other = (stage.draw(np.random.RandomState(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["unimatch", "cross-pseudo", "copy-paste", "contrast, memory"])
def test_it_resumes_to_the_same_weights(name, slices, tmp_path):
    quiet()
    train(make(KINDS[name], slices), tmp_path / "seed0" / "whole", SETTINGS, "cpu")
    stage = make(KINDS[name], slices)

    def stop(self, batch, index):
        if self.trainer.global_step == 5:
            raise RuntimeError("stopped")
        return type(stage).training_step(self, batch, index)

    stage.training_step = MethodType(stop, stage)
    with pytest.raises(RuntimeError, match="stopped"):
        train(stage, tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    train(make(KINDS[name], slices), tmp_path / "seed0" / "stopped", SETTINGS, "cpu")
    expected, found = (
        torch.load(tmp_path / "seed0" / folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in ("whole", "stopped")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# ---- FixMatch


def test_confident_cross_entropy():
    """By hand: two of four pixels count, and the mean is over all four."""
    logits = torch.tensor([[[[2.0, 0.0], [1.0, -1.0]], [[0.0, 0.0], [0.0, 3.0]]]])
    labels = torch.tensor([[[0, IGNORED], [IGNORED, 1]]])
    wanted = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(-4))) / 4
    assert confident_cross_entropy(logits, labels).item() == pytest.approx(wanted, rel=1e-6)
    assert confident_cross_entropy(logits, torch.full_like(labels, IGNORED)) == 0


def test_fixmatch_is_its_equation(ready):
    stage, batch, _ = ready(FixMatch, confidence=0.5)
    found = stage.training_step(batch, 0)
    student = stage.network(torch.cat([batch["images"], batch["strong"]]))
    sureness, classes = stage.teacher(batch["weak"]).softmax(1).max(1)
    entropy = F.cross_entropy(student[2:], classes, reduction="none")
    wanted = stage.segmentation_loss(student[:2], batch["labels"][:, None]) + (entropy * (sureness > 0.5)).mean()
    assert 0 < (sureness > 0.5).float().mean() < 1
    torch.testing.assert_close(found, wanted)


# ---- UniMatch


def test_boxes_and_mixed_maps():
    rng = np.random.RandomState(0)
    boxes = random_boxes(rng, 400, (30, 40))
    shares = boxes.flatten(1).float().mean(1)
    assert 0.4 < (shares > 0).float().mean() < 0.6, "half of the images"
    assert 0.01 < shares[shares > 0].min() and shares.max() < 0.45
    for box in boxes[shares > 0][:20]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns), "a rectangle"
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    inside = torch.tensor([[[True, False], [False, False]]] * 3)
    assert mix(maps, inside)[:, 0, 0].tolist() == [2, 0, 1] and mix(maps, inside)[:, 1, 1].tolist() == [0, 1, 2]
    assert torch.equal(mix(maps[:, None], inside)[:, 0], mix(maps, inside))


def test_channels_are_dropped_on_the_way_to_the_decoder(ready):
    """The encoder is undisturbed: what the decoder keeps is twice what it gets without dropout."""
    stage, batch, _ = ready(UniMatch)
    seen = []

    def look(module, inputs):
        seen.append(inputs)

    def inputs_of_decoder():
        seen.clear()
        hooks = [stage.network.get_submodule(name).register_forward_pre_hook(look) for name in DECODER]
        logits = stage.network(batch["weak"])
        for hook in hooks:
            hook.remove()
        return logits, list(seen)

    plain, clean = inputs_of_decoder()
    with channel_dropout(stage.network):
        perturbed, dropped = inputs_of_decoder()
    assert not torch.equal(plain, perturbed) and torch.equal(stage.network(batch["weak"]), plain)
    levels = [(clean[0][0], dropped[0][0]), *[(whole[1], half[1]) for whole, half in zip(clean, dropped, strict=True)]]
    assert len(levels) == 5
    for whole, half in levels:
        gone = (half.flatten(2) == 0).all(2)
        assert 0.2 < gone.float().mean() < 0.8, "half of the channels"
        torch.testing.assert_close(half[~gone], 2 * whole[~gone])


def test_unimatch_weighs_its_three_terms(ready, monkeypatch):
    """Without dropout: the perturbed one is the weak view itself, and each strong view counts a quarter."""
    stage, batch, _ = ready(UniMatch, confidence=0.4)
    monkeypatch.setattr("examples.methods.unimatch.DROPPED", 0.0)
    batch["boxes"] = torch.zeros_like(batch["boxes"])
    batch["boxes"][0, 0, 4:16, 4:20] = batch["boxes"][1, 1, 10:30, 2:12] = True
    found = stage.training_step(batch, 0)
    sureness, classes = stage.teacher(batch["weak"]).softmax(1).max(1)
    labels = torch.where(sureness > 0.4, classes, IGNORED)
    assert not torch.equal(labels[0], labels[1])
    terms = [confident_cross_entropy(stage.network(batch["weak"]), labels)]
    for view, inside in zip(batch["strong"], batch["boxes"], strict=True):
        mixed = torch.where(inside[:, None], view.flip(0), view)  # of two images the other one
        terms.append(confident_cross_entropy(stage.network(mixed), torch.where(inside, labels.flip(0), labels)))
    labelled = stage.segmentation_loss(stage.network(batch["images"]), batch["labels"][:, None])
    torch.testing.assert_close(found, labelled + terms[0] / 2 + (terms[1] + terms[2]) / 4)


# ---- CPS


def test_each_network_learns_the_other_ones_classes(ready):
    stage, batch, logged = ready(partial(CrossPseudo, weight=0.7))
    loss = stage.training_step(batch, 0)
    images = torch.cat([batch["images"], batch["strong"]])
    first, second = stage.network(images), stage.second(images)
    assert not torch.equal(first, second), "other weights"
    labelled = sum(stage.segmentation_loss(own[:2], batch["labels"][:, None]) for own in (first, second))
    cross = F.cross_entropy(first, second.argmax(1)) + F.cross_entropy(second, first.argmax(1))
    torch.testing.assert_close(loss, labelled + 0.7 * cross)
    loss.backward()
    for network in (stage.network, stage.second):
        assert all(p.grad is not None for p in network.parameters())
    assert {id(p) for p in stage.second.parameters()} <= {id(p) for g in stage.parameter_groups() for p in g["params"]}


def test_both_networks_start_from_the_warm_body(slices, tmp_path):
    quiet()
    stage, seen = make(CrossPseudo, slices, iterations=1), {}
    begin = stage.on_train_batch_start

    def look(batch, index):
        for name, network in (("first", stage.network), ("second", stage.second)):
            seen[name] = {key: value.clone() for key, value in network.state_dict().items()}
        begin(batch, index)

    stage.on_train_batch_start = look
    train(stage, tmp_path / "seed0" / "one", SETTINGS, "cpu")
    for key, value in seen["first"].items():
        assert torch.equal(value, seen["second"][key]) != key.startswith(HEAD), key


# ---- BCP


def test_rectangles():
    rng = np.random.RandomState(0)
    found = [rectangle(rng, (30, 45)) for _ in range(40)]
    assert all(int(inside.sum()) == 20 * 30 for inside in found)
    assert len({tuple(inside.nonzero()[0].tolist()) for inside in found}) > 5, "anywhere"


def test_pixels_keep_the_labels_of_their_images(ready):
    stage, batch, _ = ready(partial(CopyPaste, weight=0.5))
    of_labels, seen = batch["of_labels"], []
    assert of_labels[0].float().mean() > 0.4 and of_labels[1].float().mean() > 0.4, "inside, and around"
    hook = stage.network.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    found = stage.training_step(batch, 0)
    hook.remove()
    assert torch.equal(seen[-1][of_labels[:, None]], batch["images"][of_labels[:, None]])
    assert torch.equal(seen[-1][~of_labels[:, None]], batch["strong"][~of_labels[:, None]])
    logits, pseudo = stage.network(seen[-1]), stage.teacher(batch["weak"]).argmax(1)
    labels = torch.where(of_labels, batch["labels"], pseudo)

    def both(mask):
        share = mask[:, None].float()
        p, y = logits.softmax(1) * share, F.one_hot(labels, 3).movedim(-1, 1) * share
        dice = 1 - (2 * (p * y).sum((0, 2, 3)) + 1e-5) / (p.sum((0, 2, 3)) + y.sum((0, 2, 3)) + 1e-5)
        return (F.cross_entropy(logits, labels, reduction="none")[mask].mean() + dice.mean()) / 2

    torch.testing.assert_close(found, both(of_labels) + 0.5 * both(~of_labels), rtol=1e-4, atol=1e-5)


# ---- Contrast as a further term


@pytest.mark.parametrize("pixels", ["pseudo", "labels"])
def test_unlabelled_pixels_take_part_where_they_are_asked_for(ready, pixels):
    stage, batch, logged = ready(partial(ContrastTerm, pixels=pixels, samples=None), confidence=0.0)
    stage.training_step(batch, 0)
    before = logged["method/contrast"].item()
    stage.training_step(batch | {"strong": batch["strong"].flip(-1)}, 0)
    assert (logged["method/contrast"].item() == before) == (pixels == "labels")


def test_the_term_is_added_with_its_weight(ready):
    parts = {}
    for weight in (0.0, 0.3):
        stage, batch, logged = ready(partial(ContrastTerm, weight=weight, samples=None))
        loss = stage.training_step(batch, 0)
        loss.backward()
        parts[weight] = loss, logged["method/contrast"], stage.network.conv_0.conv_0.conv.weight.grad
    torch.testing.assert_close(parts[0.3][0] - parts[0.0][0], 0.3 * parts[0.3][1])
    change = (parts[0.3][2] - parts[0.0][2]).norm() / parts[0.0][2].norm()
    assert change > 1e-3, "the term reaches the encoder"


def test_every_form_of_the_term_has_as_many_samples(ready):
    """`PixelContrastLoss` counts them image by image, `RegionPHPCLoss` over the batch."""
    wanted, hard = (ready(partial(ContrastTerm, hard=hard))[0] for hard in (False, True))
    images = 2 * SETTINGS.labelled_batch
    assert wanted.contrast.samples_per_class == 128
    assert hard.contrast.samples_per_class * images == 128


def test_the_head_has_its_learning_rate_and_layer(ready):
    stage, batch, _ = ready(partial(ContrastTerm, head_lr=8.0, layer="upcat_3"), scratch_lr=1e-2)
    body, head = stage.parameter_groups()
    assert {id(p) for p in head["params"]} == {id(p) for p in stage.projector.parameters()}
    assert (body["lr"], head["lr"]) == (1e-2, 8e-2)
    assert not {id(p) for p in body["params"]} & {id(p) for p in head["params"]}
    loss = stage.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None for p in stage.projector.parameters())


def test_the_memory_holds_past_embeddings(ready):
    stage, batch, _ = ready(partial(ContrastTerm, memory=True), confidence=0.0)
    assert int(stage.queue.filled.sum()) == 0
    stage.training_step(batch, 0)
    assert int(stage.queue.filled.sum()) == 0, "written after the step"
    stage.after_step()
    assert int(stage.queue.filled.min()) > 0 and not stage.queue.embeddings.requires_grad
