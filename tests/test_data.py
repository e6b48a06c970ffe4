"""The example's data: virtual subjects, MSD and ACDC folders, splits, and one clear line for every bad input."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the examples need the `examples` extra")
pytest.importorskip("nilearn", reason="the examples need the `examples` extra")
nib = pytest.importorskip("nibabel", reason="the examples need the `examples` extra")

from small_folders import save, volume, write_acdc, write_msd  # noqa: E402

from examples.data import virtual_subjects as virtual  # noqa: E402
from examples.data.folders import read_folder  # noqa: E402
from examples.data.slices import DataError  # noqa: E402
from examples.data.splits import assign_parts, draw_split  # noqa: E402

# ---------------------------------------------------------------------------------------------- virtual subjects


@pytest.fixture(scope="module")
def maps():
    return virtual.load_maps()


def test_a_virtual_subject_is_a_function_of_seed_and_number(maps):
    planes = virtual.TRAIN_PLANES[4:6]
    image, label = virtual.make_subject(maps, 7, 0, planes)
    again, same_label = virtual.make_subject(maps, 7, 0, planes)
    assert np.array_equal(image, again) and np.array_equal(label, same_label)
    for other in (virtual.make_subject(maps, 7, 1, planes), virtual.make_subject(maps, 8, 0, planes)):
        assert not np.array_equal(label, other[1]) and not np.allclose(image, other[0])


def test_virtual_labels_are_plausible(maps):
    made = [virtual.make_subject(maps, 7, number, virtual.TRAIN_PLANES) for number in range(2)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
    assert images.shape == labels.shape == (24, *virtual.SIZE)
    assert images.dtype == np.float32 and np.isfinite(images).all()
    assert np.abs(images.mean((1, 2))).max() < 1e-4 and np.abs(images.std((1, 2)) - 1).max() < 1e-4
    shares = np.bincount(labels.ravel(), minlength=4) / labels.size
    assert np.allclose(shares, (0.61, 0.026, 0.22, 0.14), atol=(0.1, 0.02, 0.06, 0.06)), shares
    background, _, grey, white = (images[labels == c].mean() for c in range(4))
    assert background < grey and background < white


def test_parts_have_their_own_generator_seeds_and_planes(tmp_path, monkeypatch, maps):
    assert len(set(virtual.GENERATOR_SEEDS.values())) == 3 and 1000 not in virtual.GENERATOR_SEEDS.values()
    assert not set(virtual.TRAIN_PLANES) & {*virtual.NEAR_PLANES, *virtual.FAR_PLANES}
    monkeypatch.setattr(virtual, "SUBJECTS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(virtual, "load_maps", lambda: maps)
    cache = tmp_path / "cache.npz"
    made = virtual.virtual_subjects(cache)
    monkeypatch.setattr(virtual, "load_maps", lambda: pytest.fail("the cache was not used"))
    cached = virtual.virtual_subjects(cache)
    assert torch.equal(made.images, cached.images) and torch.equal(made.labels, cached.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.npz"]
    assert set(made.zones) == {"", "near", "far"}
    split = draw_split(made, 2, 1, 0)
    assert not {made.ids[i] for i in split.train} & {made.ids[i] for i in split.val + split.test}


# --------------------------------------------------------------------------------------------------------- splits


def test_splits_depend_on_the_seed_alone_and_keep_subjects_apart(tmp_path):
    slices = read_folder(write_msd(tmp_path, cases=12))
    split = draw_split(slices, 2, 1, 5)
    assert split == draw_split(slices, 2, 1, 5)
    assert len({tuple(draw_split(slices, 2, 1, seed).labelled) for seed in range(8)}) > 1
    parts = [{slices.subjects[i] for i in getattr(split, name)} for name in ("train", "val", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set(split.labelled) <= set(split.train)
    assert len({slices.subjects[i] for i in split.labelled}) == len(split.labelled) == 2
    assert len({int(slices.planes[i]) for i in split.labelled}) == 2, "one low and one high plane"
    whole = draw_split(slices, 2, None, 5)
    assert len(whole.labelled) == 6, "all three slices of two cases"


def test_too_few_subjects_or_labels(tmp_path):
    slices = read_folder(write_msd(tmp_path, cases=5))
    with pytest.raises(DataError, match="no labelled case"):
        draw_split(slices, 0, 1, 0)
    with pytest.raises(DataError, match="--labelled 9 is more than the 3 training subjects"):
        draw_split(slices, 9, 1, 0)
    with pytest.raises(DataError, match="at least 3 labelled subjects"):
        assign_parts(["a", "b"])


# -------------------------------------------------------------------------------------------------------- folders


def test_msd_layout(tmp_path):
    slices = read_folder(write_msd(tmp_path))
    assert slices.images.shape == (18, 1, 32, 32) and slices.labels.shape == (18, 32, 32)
    assert slices.classes == ("background", "Anterior", "Posterior")
    assert slices.ids[:4] == ["case_000/000", "case_000/001", "case_000/002", "case_001/000"]
    assert set(slices.parts.values()) == {"train", "val", "test"}
    _, label = volume(0)
    assert int((slices.labels[0] == 2).sum()) == int((label[:, :, 0] == 2).sum())
    volumes = slices.images.view(6, 3, 32, 32)[:, :, 6:26, 2:30].flatten(1)
    assert torch.allclose(volumes.mean(1), torch.zeros(6), atol=1e-4)
    assert torch.allclose(volumes.std(1), torch.ones(6), atol=1e-2)


def test_msd_with_channels_last_size_and_spacing(tmp_path):
    write_msd(tmp_path)
    for path in (tmp_path / "imagesTr").iterdir():
        image = nib.load(path)
        save(path, np.stack([image.get_fdata(dtype=np.float32)] * 2, -1))
    slices = read_folder(tmp_path, size=(32, 48), spacing=2.0)
    assert slices.images.shape == (18, 2, 32, 48)
    assert (slices.labels > 0).any() and slices.labels.max() <= 2


def test_acdc_layout(tmp_path):
    slices = read_folder(write_acdc(tmp_path))
    assert slices.classes[1:] == ("right ventricle", "myocardium", "left ventricle")
    assert {s for s, part in slices.parts.items() if part == "test"} == {"patient005", "patient006"}
    assert len(slices) == 6 * 2 * 3 and slices.ids[0] == "patient001_frame01/000"
    assert read_folder(tmp_path / "training").parts.keys() == {f"patient{n:03d}" for n in range(1, 5)}


def broken_label(folder, change):
    path = folder / "labelsTr" / "case_002.nii.gz"
    save(path, change(nib.load(path).get_fdata(dtype=np.float32)))


def broken_image(folder, change):
    path = folder / "imagesTr" / "case_002.nii.gz"
    save(path, change(nib.load(path).get_fdata(dtype=np.float32)))


def with_nan(image):
    image[3, 4, 1] = np.nan
    return image


def change_index(folder, **entries):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


BAD_FOLDERS = {
    "missing image": (lambda f: (f / "imagesTr/case_002.nii.gz").unlink(), r"imagesTr/case_002\.nii\.gz: no such file"),
    "missing label": (lambda f: (f / "labelsTr/case_002.nii.gz").unlink(), r"labelsTr/case_002\.nii\.gz: no such file"),
    "damaged image": (
        lambda f: (f / "imagesTr/case_002.nii.gz").write_bytes(b"no image"),
        r"imagesTr/case_002\.nii\.gz .*cannot be read",
    ),
    "other shape": (
        lambda f: broken_label(f, lambda y: y[:, :-1]),
        r"labelsTr/case_002\.nii\.gz: has shape \(20, 27, 3\), its image .* \(20, 28, 3\)",
    ),
    "out of range": (
        lambda f: broken_label(f, lambda y: y + 7 * (y == 2)),
        r"labelsTr/case_002\.nii\.gz: labels must be whole numbers from 0 to 2, got 9",
    ),
    "fractional": (lambda f: broken_label(f, lambda y: y / 2), r"case_002\.nii\.gz: labels must be whole .*, got 0\.5"),
    "background": (lambda f: broken_label(f, lambda y: 0 * y), r"labelsTr/case_002\.nii\.gz: all background"),
    "NaN": (lambda f: broken_image(f, with_nan), r"imagesTr/case_002\.nii\.gz: holds intensities that are NaN"),
    "2-D": (lambda f: [broken_image(f, lambda x: x[..., 0]), broken_label(f, lambda y: y[..., 0])], "must be a 3-D"),
    "channels": (lambda f: broken_image(f, lambda x: np.stack([x, x], -1)), r"case_002\.nii\.gz: has 2 channels"),
    "no case": (lambda f: change_index(f, training=[]), "no labelled case|dataset.json: not an MSD index"),
    "no index": (lambda f: (f / "dataset.json").unlink(), "neither dataset.json .* nor patient"),
    "no JSON": (lambda f: (f / "dataset.json").write_text("{"), r"dataset\.json: not an MSD index"),
    "no labels": (lambda f: change_index(f, labels={"0": "background"}), r"dataset\.json: needs a background and"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_input_is_named_in_one_line(tmp_path, name):
    breaks, message = BAD_FOLDERS[name]
    breaks(write_msd(tmp_path, cases=4))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_acdc_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")
    write_acdc(tmp_path)
    (tmp_path / "training/patient002/patient002_frame09_gt.nii.gz").unlink()
    with pytest.raises(DataError, match=r"patient002_frame09_gt\.nii\.gz: no such file"):
        read_folder(tmp_path)
