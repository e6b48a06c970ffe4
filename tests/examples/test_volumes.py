"""3-D training: volumes of different size, patches, a sliding window, and the three stages on 48^3 patches."""

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

for package in ("monai", "lightning", "nibabel", "nilearn", "h5py", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from torch import nn  # noqa: E402

from examples import probes, three_stage  # noqa: E402
from examples.arms import Arms  # noqa: E402
from examples.batches import Crops  # noqa: E402
from examples.data import virtual_subjects as virtual  # noqa: E402
from examples.data.folders import read_folder, read_volumes  # noqa: E402
from examples.data.slices import DataError  # noqa: E402
from examples.data.splits import apply_split_file, draw_split  # noqa: E402
from examples.evaluate import dice_table, predict_volumes  # noqa: E402
from examples.networks import build_network  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.stages import PixelPretraining, shuffled  # noqa: E402
from tests.tools.small_folders import save, volume, write_h5, write_msd, write_pictures  # noqa: E402

PATCH = (48, 48, 48)
SMALL = {"image_batch": 2, "pixel_batch": 1, "labelled_batch": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPES = [(20, 28, 9), (60, 50, 40), (20, 28, 9), (64, 48, 50)]


@pytest.fixture(scope="module")
def msd(tmp_path_factory):
    """Four volumes of three sizes."""
    folder = write_msd(tmp_path_factory.mktemp("msd"), cases=4)
    for number, shape in enumerate(SHAPES):
        image, label = volume(number, shape)
        save(folder / "imagesTr" / f"case_{number:03d}.nii.gz", image)
        save(folder / "labelsTr" / f"case_{number:03d}.nii.gz", label)
    return folder


@pytest.fixture(scope="module")
def volumes(msd):
    return read_volumes(msd, PATCH)


# ----------------------------------------------------------------------------------------------------------- data


def test_volumes_keep_their_sizes_and_are_at_least_a_patch(volumes):
    assert [tuple(label.shape) for label in volumes.labels] == [PATCH, (60, 50, 48), PATCH, (64, 48, 50)]
    assert [tuple(image.shape) for image in volumes.images] == [(1, *label.shape) for label in volumes.labels]
    assert volumes.ids == volumes.subjects == [f"case_{n:03d}" for n in range(4)] and volumes.size == PATCH
    assert volumes.has_foreground().all() and set(volumes.parts.values()) == {"train", "val", "test"}
    image, label = volume(1, SHAPES[1])
    inside = volumes.images[1][0, :, :, 4:44]
    assert torch.allclose(inside, torch.from_numpy((image - image.mean()) / image.std()), atol=1e-3)
    assert torch.equal(volumes.labels[1][:, :, 4:44], torch.from_numpy(label))
    assert (volumes.labels[1][:, :, :4] == 0).all() and (volumes.images[1][0, :, :, :4] == inside.min()).all()


def test_volumes_of_h5_slices_are_those_of_h5_volumes(tmp_path):
    whole = read_volumes(write_h5(tmp_path / "volumes", 3), PATCH)
    slices = read_volumes(write_h5(tmp_path / "slices", 3, by_slice=True, by_volume=False), PATCH)
    assert whole.ids == slices.ids == [f"patient{n:03d}_frame{frame}" for n in (1, 2, 3) for frame in ("01", "09")]
    for pair in (zip(whole.images, slices.images), zip(whole.labels, slices.labels)):
        assert all(torch.equal(a, b) for a, b in pair)
    flat = read_folder(tmp_path / "volumes")
    assert torch.equal(whole.labels[0][14:34, 10:38, 22:25].permute(2, 0, 1), flat.labels[:3, 6:26, 2:30])


def test_pictures_are_no_volumes(tmp_path):
    with pytest.raises(DataError, match="holds pictures, no volumes"):
        read_volumes(write_pictures(tmp_path), PATCH)


def test_a_split_file_selects_volumes(volumes, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["case_003"], "val": ["case_001"], "test": ["case_000"]}))
    selected, _ = apply_split_file(volumes, path)
    assert selected.ids == ["case_000", "case_001", "case_003"] and selected.size == PATCH
    assert selected.of_part("train") == [2] and torch.equal(selected.labels[2], volumes.labels[3])


def test_virtual_volumes_are_the_virtual_subjects(monkeypatch):
    monkeypatch.setattr(virtual, "VOLUMES", {"train": 1, "val": 1, "test": 1})
    made = virtual.virtual_volumes(PATCH)
    assert [tuple(image.shape) for image in made.images] == [(1, 48, 56, 48)] * 3
    assert all(abs(float(image.mean())) < 1e-4 and abs(float(image.std()) - 1) < 1e-4 for image in made.images)
    _, label = virtual.make_subject(virtual.load_maps(), virtual.GENERATOR_SEEDS["train"], 0, range(88, 92, 4))
    same = made.labels[0][:, :, virtual.VOLUME_PLANES.index(88)]
    assert torch.equal(same, torch.from_numpy(np.ascontiguousarray(label[0, ::2, ::2])))


# ------------------------------------------------------------------------------------------- patches and windows


def test_patches_of_volumes_of_different_size(volumes):
    crops = Crops(volumes, PATCH)
    positions = np.array([0, 3, 1, 2])
    plain, labels, views = crops.draw(np.random.RandomState(0), positions, 2)
    again, _, _ = crops.draw(np.random.RandomState(0), positions, 2)
    assert plain.shape == (4, 1, *PATCH) and labels.shape == (4, *PATCH) and torch.equal(plain, again)
    assert set(labels.unique().tolist()) <= {0, 1, 2} and not torch.equal(views[0], views[1])
    for number, patch in enumerate(plain):  # boxes are bright where the labels say so
        if (labels[number] > 0).any():
            assert patch[0][labels[number] > 0].mean() > patch[0][labels[number] == 0].mean() + 0.5
    assert (labels > 0).flatten(1).any(1).sum() >= 3


class ShowsItsInput(nn.Module):
    """Its class of every voxel is the number there."""

    def __init__(self, classes):
        super().__init__()
        self.numbers = nn.Parameter(torch.arange(float(classes)))

    def forward(self, images):
        return -((images - self.numbers.view(1, -1, 1, 1, 1)) ** 2)


class Threshold(nn.Module):
    """Two classes by intensity, after a layer that has seen how large its input was."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes = set()

    def forward(self, images):
        self.sizes.add(tuple(images.shape[2:]))
        assert not self.training
        return torch.cat([-images, images], 1)


def test_a_window_slides_over_whole_volumes(volumes):
    network = Threshold().train()
    predicted = predict_volumes(network, volumes.images, PATCH)
    assert network.training and network.sizes == {PATCH}
    for found, image in zip(predicted, volumes.images):
        assert found.dtype == torch.uint8 and torch.equal(found, (image[0] > 0).to(torch.uint8))


def test_one_window_is_the_network_itself(volumes):
    torch.manual_seed(0)
    network = build_network(1, 3, Settings.features, 3).eval()
    (found,) = predict_volumes(network, volumes.images[:1], PATCH)
    with torch.no_grad():
        assert torch.equal(found, network(volumes.images[0][None])[0].argmax(0).to(torch.uint8))


def test_dice_of_volumes(volumes):
    network = Threshold()
    table = dice_table(network, volumes, [0, 1])
    expected = []
    for number in (0, 1):
        image, label = volume(number, SHAPES[number])
        found, truth = torch.from_numpy(image - image.mean() > 0), torch.from_numpy(label == 1)
        expected.append(float(200 * (found & truth).sum() / (found.sum() + truth.sum())))
    assert table["all"]["Anterior"] == pytest.approx(sum(expected) / 2, abs=1e-3) and set(table) == {"all"}


def test_no_padding_of_volumes_counts(volumes):
    """A prediction that is right in every volume as stored, and wrong where it was padded."""
    shown = [torch.ones(label.shape) for label in volumes.labels]
    for number, image in enumerate(shown):
        corner = [(side - own) // 2 for side, own in zip(image.shape, SHAPES[number])]
        inside = tuple(slice(begin, begin + own) for begin, own in zip(corner, SHAPES[number]))
        image[inside] = torch.from_numpy(volume(number, SHAPES[number])[1]).float()
    right = dataclasses.replace(volumes, images=[image[None] for image in shown])
    assert dice_table(ShowsItsInput(3), right, [0, 1, 2, 3])["all"]["mean"] == 100
    assert [tuple(truth.shape) for truth in right.truth([0, 1, 2, 3])] == SHAPES


def test_shuffled_labels_of_volumes(volumes):
    mixed = shuffled(volumes, 0)
    for before, after in zip(volumes.labels, mixed):
        assert before.shape == after.shape and not torch.equal(before, after)
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


def test_stage_2_reaches_encoder_and_head_in_3d(volumes):
    split = draw_split(volumes, 1, None, 0)
    stage = PixelPretraining(volumes, split, Settings(crop=PATCH, **SMALL), 2, 0)
    batch = stage.draw(np.random.RandomState(0))
    assert batch["images"].shape == (2, 1, *PATCH) and batch["labels"].shape == (2, *PATCH)
    stage.log = stage.log_dict = lambda *args, **kwargs: None
    loss = stage.training_step(batch, 0)
    loss.backward()
    assert loss > 0
    for name in ("network.conv_0", "network.down_4", "network.upcat_1", "projector"):
        gradients = [p.grad for p in stage.get_submodule(name).parameters() if p.grad is not None]
        assert gradients and sum(float(g.abs().sum()) for g in gradients) > 0, name


# --------------------------------------------------------------------------------------------------- a whole run


def arguments(out, *more):
    fixed = ["--data", "builtin", "--volumes", "--patch", "48", "48", "48", "--labelled", "1", "--device", "cpu"]
    return [*fixed, "--out", str(out), "--iterations", "1", "2", "1", "--checkpoint-every", "1", *more]


def test_three_stages_on_volumes_stopped_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(virtual, "VOLUMES", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(three_stage, "VOLUME_BATCHES", SMALL)
    monkeypatch.setattr(three_stage, "Settings", partial(Settings, probe_iterations=2))
    monkeypatch.setattr(probes, "VIEWS", 1)
    step = PixelPretraining.training_step

    def stop(self, batch, index):
        if self.trainer.global_step == 1:
            raise RuntimeError("stopped")
        return step(self, batch, index)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(PixelPretraining, "training_step", stop)
        three_stage.main(arguments(out))
    assert "data: virtual subjects of the MNI152 template, as volumes" in capsys.readouterr().out
    assert torch.load(out / "seed0/stage2/last.ckpt", weights_only=True)["global_step"] == 1
    assert three_stage.main(arguments(out, "--resume")) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["size"] == list(PATCH) and results["data"]["noun"] == "volumes"
    (labelled,) = results["runs"][0]["labelled"]
    assert labelled in results["splits"]["train"] == ["train-00", "train-01"]
    arms = results["runs"][0]["arms"]
    assert set(arms) >= {"ours", "supervised_iterations", "probe_stage2", "probe_shuffled"}
    assert arms["ours"]["iterations"] == arms["supervised_iterations"]["iterations"] == 4
    for arm in arms.values():
        values = arm["dice"]["validation"]["all"]
        assert set(values) == {"CSF", "grey matter", "white matter", "mean"} and 0 <= values["mean"] <= 100
    assert {path.stem for path in (out / "figures").iterdir()} == {"dice", "curves", "segmentations"}
    assert "2 training volumes" in (out / "report.md").read_text()

    whole = tmp_path / "whole" / "seed0"
    shutil.copytree(out / "seed0" / "stage1", whole / "stage1")
    settings = Settings(iterations=(1, 2, 1), crop=PATCH, checkpoint_every=1, probe_iterations=2, **SMALL)
    made = virtual.virtual_volumes(PATCH)
    Arms(made, draw_split(made, 1, None, 0), settings, 0, whole, "cpu").train("2")
    resumed = out / "seed0"
    expected, found = (
        torch.load(folder / "stage2" / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, resumed)
    )
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--patch", "48", "48", "40"], "must be multiples of 16"),
        (["--labelled-slices", "2"], "--labelled-slices is about slices"),
        (["--size", "48", "48"], "--size is about slices"),
        (["--slices-per-subject", "2"], "--slices-per-subject is about slices"),
    ],
)
def test_options_that_volumes_do_not_have(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        three_stage.main(["--out", str(tmp_path), "--volumes", *more])
    assert ended.value.code == 2 and message in capsys.readouterr().err
