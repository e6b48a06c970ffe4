"""The example's data: virtual subjects, folders in every layout, splits, and one clear line for every bad input."""

import json
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the examples need the `examples` extra")
pytest.importorskip("nilearn", reason="the examples need the `examples` extra")
nib = pytest.importorskip("nibabel", reason="the examples need the `examples` extra")
pytest.importorskip("h5py", reason="the examples need the `examples` extra")

from PIL import Image  # noqa: E402

from examples.data import virtual_subjects as virtual  # noqa: E402
from examples.data.folders import FINDERS, read_folder, recognise  # noqa: E402
from examples.data.layout import subject_of  # noqa: E402
from examples.data.slices import DataError  # noqa: E402
from examples.data.splits import (  # noqa: E402
    apply_split_file,
    assign_parts,
    draw_slices,
    draw_split,
    first_split,
)
from examples.three_stage import describe  # noqa: E402
from tests.tools.small_folders import (  # noqa: E402
    save,
    save_h5,
    volume,
    write_acdc,
    write_h5,
    write_instances,
    write_la,
    write_msd,
    write_nnunet,
    write_pictures,
    write_ssl4mis,
)

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


def test_labelled_slices_are_spread_over_subjects(tmp_path):
    slices = read_folder(write_msd(tmp_path, cases=8))  # 6 subjects of 3 slices in training
    foreground = slices.has_foreground()
    for count in (1, 4, 6, 8, 18):
        split = draw_slices(slices, count, 3)
        per_subject = Counter(slices.subjects[i] for i in split.labelled)
        assert len(set(split.labelled)) == count and set(split.labelled) <= set(split.train)
        assert len(per_subject) == min(count, 6) and max(per_subject.values()) - min(per_subject.values()) <= 1
        assert foreground[split.labelled].all()
    assert len({int(slices.planes[i]) for i in draw_slices(slices, 3, 0).labelled}) == 3, "a band of planes each"
    assert draw_slices(slices, 4, 0) == draw_slices(slices, 4, 0)
    assert len({tuple(draw_slices(slices, 4, seed).labelled) for seed in range(8)}) > 1
    for count in (0, 19):
        with pytest.raises(DataError, match=f"--labelled-slices {count}: must be 1 to 18, the training slices"):
            draw_slices(slices, count, 0)


def write_split(folder, **lists):
    path = folder / "split.json"
    path.write_text(json.dumps(lists))
    return path


def test_a_split_file_names_ids_cases_or_subjects(tmp_path):
    data = read_folder(write_acdc(tmp_path))
    train = ["patient001", "patient002_frame01", "patient006_frame09/002"]
    parts = {"train": train, "val": ["patient003"], "test": ["patient004_frame01"]}
    assert apply_split_file(data, write_split(tmp_path, **parts))[1] is None, "drawn"
    slices, labelled = apply_split_file(data, write_split(tmp_path, **parts, labelled=train[1:]))
    found = {part: [slices.ids[i] for i in slices.of_part(part)] for part in ("train", "val", "test")}
    one = [f"patient001_frame{frame}/{z:03d}" for frame in ("01", "09") for z in range(3)]
    two = [f"patient002_frame01/{z:03d}" for z in range(3)]
    assert found["train"] == [*one, *two, "patient006_frame09/002"]
    assert found["val"] == [name.replace("001_", "003_") for name in one]
    assert found["test"] == [name.replace("002_", "004_") for name in two]
    assert [slices.ids[i] for i in labelled] == [*two, "patient006_frame09/002"]
    kept = data.ids.index("patient002_frame01/001")
    at = slices.ids.index("patient002_frame01/001")
    assert torch.equal(slices.images[at], data.images[kept]) and slices.planes[at] == data.planes[kept]
    whole = draw_split(data, 2, 1, 0).ids(data)
    again, labelled = apply_split_file(data, write_split(tmp_path, **whole))
    assert [again.ids[i] for i in labelled] == whole["labelled"], "a run's own split.json can be given to another"


BAD_SPLITS = {
    "no part": ({"train": ["patient001"]}, r"split\.json: is not of the form"),
    "text": ({"train": "patient001"}, r"split\.json: is not of the form"),
    "nested": ({"train": [["patient001"]]}, r"split\.json: is not of the form"),
    "unknown": ({"test": ["patient009"]}, r"split\.json: test: 'patient009' is no id, case or subject of the data"),
    "empty": ({"val": []}, r"split\.json: val: is empty"),
    "two parts": ({"val": ["patient001_frame09"]}, r"split\.json: subject patient001 is in train and in val"),
    "labelled": ({"labelled": ["patient003/000", "patient003"]}, r"labelled: 'patient003/000' is no id"),
    "labelled held out": ({"labelled": ["patient003"]}, r"labelled: patient003_frame01/000 is not among the training"),
}


def test_a_split_file_that_is_no_split_file(tmp_path):
    data = read_folder(write_acdc(tmp_path))
    for content, message in ((b"[1, 2]", "is not of the form"), (b"{", "is no JSON"), (b"\xff\xfe", "is no JSON")):
        (tmp_path / "split.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"split\.json: {message}") as caught:
            apply_split_file(data, tmp_path / "split.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_bad_split_files(tmp_path, name):
    change, message = BAD_SPLITS[name]
    data = read_folder(write_acdc(tmp_path))
    good = {"train": ["patient001"], "val": ["patient003"], "test": ["patient004"]}
    path = write_split(tmp_path, **(change if name == "no part" else good | change))
    with pytest.raises(DataError, match=message):
        apply_split_file(data, path)


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
    assert read_folder(tmp_path).source["spacing_mm"]["case_003"] == [1.0, 1.0, 3.0]
    slices = read_folder(tmp_path, size=(32, 48), spacing=2.0)
    assert slices.source["spacing_mm"] == {f"case_{number:03d}": [2.0, 2.0, 3.0] for number in range(6)}
    assert slices.images.shape == (18, 2, 32, 48)
    assert (slices.labels > 0).any() and slices.labels.max() <= 2


def test_acdc_layout(tmp_path):
    slices = read_folder(write_acdc(tmp_path))
    assert slices.classes[1:] == ("right ventricle", "myocardium", "left ventricle")
    assert {s for s, part in slices.parts.items() if part == "test"} == {"patient005", "patient006"}
    assert len(slices) == 6 * 2 * 3 and slices.ids[0] == "patient001_frame01/000"
    assert slices.source["spacing_mm"]["patient006_frame09"] == [1.5, 1.5, 10.0]
    assert read_folder(tmp_path / "training").parts.keys() == {f"patient{n:03d}" for n in range(1, 5)}


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_layout(tmp_path, version):
    slices = read_folder(write_nnunet(tmp_path, version=version))
    assert slices.source["layout"] == "nnU-Net" and slices.classes == ("background", "Anterior", "Posterior")
    assert slices.images.shape == (18, 2, 32, 32) and slices.ids[3] == "case_001/000"
    assert torch.allclose(slices.images[:, 0, 6:26, 2:30], slices.images[:, 1, 6:26, 2:30], atol=1e-4), "normalised"
    write_msd(tmp_path / "msd")
    assert torch.equal(slices.labels, read_folder(tmp_path / "msd").labels)


def test_msd_cases_with_numbers_of_four_digits(tmp_path):
    """case_0000 looks like the first channel of nnU-Net's "case"."""
    names = [f"case_{number:04d}" for number in range(6)]
    slices = read_folder(write_msd(tmp_path, names=names))
    assert slices.source["layout"] == "MSD" and sorted(set(slices.subjects)) == names


BAD_NNUNET = {
    "a channel is missing": (
        lambda f: (f / "imagesTr/case_001_0001.nii.gz").unlink(),
        r"case_001_0001\.nii\.gz: no such",
    ),
    "no label": (lambda f: (f / "labelsTr/case_001.nii.gz").unlink(), r"labelsTr/case_001\.nii\.gz: no such file"),
    "regions": (
        lambda f: change_index(f, labels={"background": 0, "whole": [1, 2], "core": 2}),
        r"dataset\.json: labels must be numbered 0, 1, \.\.\., one class each",
    ),
    "ignore": (lambda f: change_index(f, labels={"background": 0, "a": 1, "ignore": 2}), "has a label `ignore`"),
    "empty channels": (lambda f: change_index(f, channel_names={}), "must name `channel_names` and `labels`"),
    "elsewhere": (
        lambda f: save(f / "labelsTr/case_001.nii.gz", volume(1)[1], (-1.0, 1.0, 3.0)),
        r"labelsTr/case_001\.nii\.gz: lies elsewhere than case_001_0000\.nii\.gz by their headers",
    ),
    "a gap": (lambda f: change_index(f, labels={"background": 0, "a": 2}), "labels must be numbered 0, 1"),
    "no channels": (lambda f: change_index(f, channel_names=None), "must name `channel_names` and `labels`"),
    "other shape": (
        lambda f: save(f / "imagesTr/case_001_0001.nii.gz", volume(1)[0][:-1]),
        r"its image case_001_0001\.nii\.gz \(19, 28, 3\)",
    ),
    "damaged": (
        lambda f: (f / "imagesTr/case_001_0001.nii.gz").write_bytes(b"no image"),
        r"case_001_0000\.nii\.gz or case_001_0001\.nii\.gz or its label .*: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_NNUNET)
def test_bad_nnunet_folders(tmp_path, name):
    breaks, message = BAD_NNUNET[name]
    breaks(write_nnunet(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", [".", "2018LA_Seg_Training Set"])
def test_la_layout(tmp_path, inside):
    write_la(tmp_path, inside=inside)
    (tmp_path / "train.list").write_text("CASE04\nCASE00\nCASE02\n")
    (tmp_path / "test.list").write_text("CASE01/mri_norm2.h5\n")
    slices = read_folder(tmp_path)
    assert slices.source["layout"] == "h5 case by case" and slices.classes == ("background", "class 1")
    assert set(slices.subjects) == {"CASE00", "CASE01", "CASE02", "CASE04"} and slices.parts["CASE01"] == "test"
    _, label = volume(4, classes=2)
    at = slices.ids.index("CASE04/001")
    assert torch.equal(slices.labels[at, 6:26, 2:30], torch.from_numpy(label[:, :, 1])), "[X, Y, Z], not rows"


def test_bad_la_folders(tmp_path):
    write_la(tmp_path)
    write_la(tmp_path, cases=1, inside="again")
    with pytest.raises(DataError, match=r"again/CASE00/mri_norm2\.h5: case CASE00 is also in"):
        read_folder(tmp_path)
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "test.list").write_text("CASE01/mri_norm2.h5\n")
    assert read_folder(tmp_path).parts["CASE01"] == "test", "named once"
    (tmp_path / "val.list").write_text("CASE09\n")
    with pytest.raises(DataError, match=r"CASE09/mri_norm2\.h5: no such file, but the val list"):
        read_folder(tmp_path)


def test_the_first_of_a_list_are_labelled(tmp_path):
    write_la(tmp_path)
    for part, names in (("train", ("CASE04", "CASE00", "CASE02")), ("val", ("CASE01",)), ("test", ("CASE03",))):
        (tmp_path / f"{part}.list").write_text("\n".join(names))
    slices = read_folder(tmp_path)
    split = first_split(slices, 2)
    assert {slices.subjects[i] for i in split.train} == {"CASE04", "CASE00", "CASE02"}
    assert [slices.ids[i] for i in split.labelled] == [
        f"{name}/00{z}" for name in ("CASE04", "CASE00") for z in range(3)
    ]
    for count in (0, 4):
        with pytest.raises(DataError, match=f"--labelled-first {count}: must be 1 to 3, the training subjects"):
            first_split(slices, count)


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


def two_of_one_name(folder):
    entries = json.loads((folder / "dataset.json").read_text())["training"]
    change_index(folder, training=[*entries, entries[1]])


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
    "one name twice": (two_of_one_name, r"dataset\.json: two training cases are called case_001"),
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


# ------------------------------------------------------------------------------------------------------- patients


def without_lists(folder):
    for path in write_ssl4mis(folder).glob("*.list"):
        path.unlink()
    return folder


def several(*endings, patients=6):
    """Names of files, of each patient one with each ending."""
    return [f"patient{number:03d}{ending}" for number in range(1, patients + 1) for ending in endings]


FRAMES, SLICES = several("_frame01", "_frame09"), several(*(f"_frame{f:02d}_slice_{z}" for f in (1, 9) for z in (1, 2)))
PATIENTS = {  # folders in every layout that the reader knows, with several files of each patient
    "MSD, frames": partial(write_msd, names=FRAMES),
    "MSD, end of diastole and of systole": partial(write_msd, names=several("_ED", "_ES")),
    "MSD, sessions": partial(write_msd, names=[f"sub-{n:02d}_ses-{m}_T{m}w" for n in range(1, 7) for m in (1, 2)]),
    "MSD, time points": partial(write_msd, names=several("_t1", "_t2")),
    "ACDC": write_acdc,
    "ACDC, training alone": partial(write_acdc, patients=6, tests=0),
    "h5 volumes": write_h5,
    "h5 slices in slices/": partial(write_h5, by_slice=True, by_volume=False),
    "h5 slices in slices/ and volumes": partial(write_h5, by_slice=True),
    "h5 slices in data/": partial(write_h5, by_slice=True, by_volume=False, slices="."),
    "h5 slices and volumes in data/": partial(write_h5, by_slice=True, slices="."),
    "h5 slices and volumes of SSL4MIS": write_ssl4mis,
    "h5 slices and volumes of SSL4MIS without lists": without_lists,
    "LA": partial(write_la, names=several("")),
    "nnU-Net, frames": partial(write_nnunet, names=FRAMES),
    "instances, views": partial(write_instances, names=several("_2CH", "_4CH")),
    "PNG slices": partial(write_pictures, names=SLICES),
    "PNG slices beside their masks": partial(write_pictures, names=SLICES, masks="images", ending="_mask"),
    "PNG views": partial(write_pictures, names=several("_2CH_ED", "_2CH_ES", "_4CH_ED")),
    "PNG eyes": partial(write_pictures, names=several("L", "R")),
}


def patient(name):
    return re.match(r"patient\d{3}|sub-\d{2}", name)[0]


def check_patients(slices, count):
    """Each of `count` patients is one subject, and in one part."""
    parts = {part: {patient(slices.ids[i]) for i in slices.of_part(part)} for part in ("train", "val", "test")}
    assert all(parts.values()) and sum(map(len, parts.values())) == len(set().union(*parts.values())) == count, parts
    assert set(slices.subjects) == set().union(*parts.values())


@pytest.mark.parametrize("name", PATIENTS)
def test_no_patient_is_in_two_parts(tmp_path, name):
    folder = PATIENTS[name](tmp_path)
    check_patients(read_folder(folder), 9 if "SSL4MIS" in name else 6)


def test_every_layout_is_among_the_folders_of_patients(tmp_path):
    found = set()
    for number, write in enumerate(PATIENTS.values()):
        (tmp_path / str(number)).mkdir()
        found.add(next(find for find in FINDERS if find(write(tmp_path / str(number))) is not None))
    assert found == set(FINDERS)


def test_the_flat_folder_of_ssl4mis(tmp_path):
    flat = read_folder(write_ssl4mis(tmp_path / "flat"))
    names = (tmp_path / "flat" / "train_slices.list").read_text().split()
    assert len(flat.of_part("train")) == len(names) == 30 and flat.source["layout"] == "h5 slices and volumes"
    assert [flat.ids[i] for i in flat.of_part("val")][:4] == [
        f"patient006_frame{f}" for f in ("01/000", "01/001", "01/002", "09/000")
    ]
    whole = read_folder(write_h5(tmp_path / "volumes", 9))
    for subject in ("patient001", "patient006", "patient009"):
        ours, theirs = ([i for i, name in enumerate(s.subjects) if name == subject] for s in (flat, whole))
        assert torch.equal(flat.images[ours], whole.images[theirs]), "slices are put together and normalised together"
        assert torch.equal(flat.labels[ours], whole.labels[theirs])


def real(name):
    """A set of real data; the test is skipped where HPCLOSS_DATA names no folder that holds it."""
    folder = Path(os.environ.get("HPCLOSS_DATA", "")) / name
    if "HPCLOSS_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"HPCLOSS_DATA names no folder that holds {name}/")
    return folder


def test_the_real_hippocampus():
    folder = real("hippocampus")
    layout = recognise(folder)
    assert layout.name == "MSD" and layout.classes == ("background", "Anterior", "Posterior")
    assert len(layout.cases) == len({case.subject for case in layout.cases}) == 260
    image, label, spacing = layout.read(layout.cases[0], None)
    assert (
        image.shape[1:] == label.shape[1:] and spacing == (1.0, 1.0, 1.0) and set(label.unique().tolist()) == {0, 1, 2}
    )


def test_the_real_nuclei():
    """557 grey and 107 RGB pictures, as the set's description has it."""
    layout = recognise(real("nuclei"))
    assert layout.name == "images and masks" and len(layout.cases) == 664 and layout.largest == (256, 256)
    channels = Counter(len(layout.read(case, None).image) for case in layout.cases)
    assert channels == {1: 557, 3: 107}


def test_the_real_folder_of_ssl4mis():
    layout = recognise(real("acdc"))
    parts = {part: {case.subject for case in layout.cases if case.part == part} for part in ("train", "val", "test")}
    assert {part: len(subjects) for part, subjects in parts.items()} == {"train": 70, "val": 10, "test": 20}
    assert len(set().union(*parts.values())) == 100, "a patient is in two parts"
    assert sum(len(case.files) for case in layout.cases if case.part == "train") == 1312


SUBJECTS = {
    "patient003_frame01_slice_7": "patient003",
    "patient003-frame1": "patient003",
    "case0005_slice000": "case0005",
    "sub-01_ses-02_run-1_T1w": "sub-01",
    "sub-01_T2w": "sub-01",
    "p7_week12": "p7",
    "A0S9V9_sa_ES": "A0S9V9",
    "Image_01L": "Image_01",
    "hippocampus_001": "hippocampus_001",
    "BRATS_001": "BRATS_001",
    "la_003": "la_003",
    "frame_0003": "frame_0003",
    "ISIC_0000003": "ISIC_0000003",
    "00071198d059": "00071198d059",
    "train_test_1": "train_test_1",
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_subject_of_a_name(name):
    assert subject_of(name) == SUBJECTS[name]


def test_names_that_may_be_of_one_subject_are_not_divided_in_silence(tmp_path):
    write_pictures(tmp_path, names=several("_1", "_2", patients=4))
    message = r"patient001_1 and patient001_2 may be one subject: --subject PATTERN"
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)
    check_patients(read_folder(tmp_path, subject=".+(?=_)"), 4)
    assert len(set(read_folder(tmp_path, subject=".+").subjects)) == 8
    with pytest.raises(DataError, match=r"--subject \^case: matches nothing in patient001_1"):
        read_folder(tmp_path, subject="^case")
    write_lists(tmp_path, train=["patient001_1", "patient001_2"], val=["patient002_1"], test=["patient003_1"])
    assert len(read_folder(tmp_path)) == 4, "lists say what is in which part"
    write_lists(tmp_path, val=["patient001_1"])
    with pytest.raises(DataError, match="subject patient001 is named for train and for val"):
        read_folder(tmp_path, subject=".+(?=_)")


@pytest.mark.parametrize("name", PATIENTS)
def test_a_pattern_tells_subjects_in_every_layout(tmp_path, name):
    slices = read_folder(PATIENTS[name](tmp_path), subject=r"^[a-z-]+\d+")
    check_patients(slices, 9 if "SSL4MIS" in name else 6)


# ------------------------------------------------------------------------------------------------------------- h5


def test_h5_volumes_hold_what_nifti_does(tmp_path):
    nifti = read_folder(write_acdc(tmp_path / "acdc", patients=6, tests=0))
    slices = read_folder(write_h5(tmp_path / "h5"))
    assert slices.source["layout"] == "h5 volumes" and slices.source["label_values"] == [0, 1, 2, 3]
    assert slices.classes == ("background", "class 1", "class 2", "class 3")
    assert slices.ids == nifti.ids and slices.subjects == nifti.subjects and slices.parts == nifti.parts
    assert torch.equal(slices.labels, nifti.labels) and torch.equal(slices.planes, nifti.planes)
    assert torch.allclose(slices.images, nifti.images, atol=1e-5)
    assert set(slices.parts) == {f"patient{n:03d}" for n in range(1, 7)}, "both frames are one subject"


def test_h5_slices_are_put_together_in_the_order_of_their_numbers(tmp_path):
    deep = {"shape": (20, 28, 11)}
    whole = read_folder(write_h5(tmp_path / "volumes", 3, **deep))
    slices = read_folder(write_h5(tmp_path / "slices", 3, by_slice=True, by_volume=False, **deep))
    assert slices.source["layout"] == "h5 slices"
    assert slices.ids[:11] == [f"patient001_frame01/{number:03d}" for number in range(1, 12)], "10 after 9, not after 1"
    assert torch.equal(slices.images, whole.images) and torch.equal(slices.labels, whole.labels)
    assert torch.equal(slices.planes, whole.planes)
    (tmp_path / "slices" / "data").rename(tmp_path / "bare")
    assert read_folder(tmp_path / "bare").ids == slices.ids, "slices/ without data/"


def write_lists(folder, **lists):
    for name, lines in lists.items():
        (folder / f"{name}.list").write_text("\n".join(lines) + "\n")
    return folder


LISTS = {
    "train": ["patient001_frame01", "patient001_frame09"],
    "train_slices": ["patient001_frame01_slice_3", "patient001_frame01_slice_1", "patient002_frame09_slice_2.h5"],
    "val": ["patient003_frame01", "patient003_frame09"],
    "test": ["patient004_frame01"],
}


def test_h5_lists_name_the_parts_and_leave_the_rest_out(tmp_path):
    slices = read_folder(write_lists(write_h5(tmp_path, by_slice=True), **LISTS))
    found = {part: [slices.ids[i] for i in slices.of_part(part)] for part in ("train", "val", "test")}
    assert found["train"] == ["patient001_frame01/001", "patient001_frame01/003", "patient002_frame09/002"]
    assert found["val"] == [f"patient003_frame{frame}/{z:03d}" for frame in ("01", "09") for z in range(3)]
    assert found["test"] == [f"patient004_frame01/{z:03d}" for z in range(3)]
    (tmp_path / "train_slices.list").unlink()
    slices = read_folder(tmp_path)
    assert slices.source["layout"] == "h5 volumes" and len(slices.of_part("train")) == 6
    for part in ("val", "test"):
        (tmp_path / f"{part}.list").unlink()
    write_lists(tmp_path, train=[f"patient{n:03d}_frame01" for n in range(1, 6)])
    drawn = read_folder(tmp_path).parts
    assert set(drawn) == {f"patient{n:03d}" for n in range(1, 6)}, "what the list does not name is left out"
    assert sorted(drawn.values()) == ["test", "train", "train", "train", "val"], "parts without a list are drawn"


@pytest.mark.parametrize("write", [write_h5, partial(write_pictures, names=several("_frame1", "_frame2"))])
def test_what_lists_of_validation_and_test_do_not_name_is_for_training(tmp_path, write):
    first, second = ("patient001_frame01", "patient002_frame01") if write is write_h5 else several("_frame1")[:2]
    slices = read_folder(write_lists(write(tmp_path), val=[first], test=[second]))
    assert slices.parts == {f"patient{n:03d}": {1: "val", 2: "test"}.get(n, "train") for n in range(1, 7)}


def test_a_spacing_that_leaves_no_class(tmp_path):
    with pytest.raises(DataError, match="no pixel of a class is left at a spacing of 500"):
        read_folder(write_msd(tmp_path), spacing=500)


def spoil(folder, name="patient002_frame01", **arrays):
    image, label = np.zeros((3, 28, 20), np.float32), np.ones((3, 28, 20), np.uint8)
    save_h5(folder / "data" / f"{name}.h5", **({"image": image, "label": label} | arrays))


BAD_H5 = {
    "damaged": (
        lambda f: (f / "data/patient002_frame01.h5").write_bytes(b"no HDF5"),
        r"patient002_frame01\.h5: cannot be read \(",
    ),
    "no label": (
        lambda f: save_h5(f / "data/patient002_frame01.h5", image=np.zeros((3, 28, 20))),
        r"patient002_frame01\.h5: holds no dataset `label`",
    ),
    "shapes": (
        lambda f: spoil(f, label=np.ones((3, 28, 19))),
        r"patient002_frame01\.h5: has shape \(3, 28, 19\), its image \(3, 28, 20\)",
    ),
    "1-D": (lambda f: spoil(f, image=np.zeros(3), label=np.zeros(3)), r"frame01\.h5: `image` must be a slice \[H, W\]"),
    "NaN": (lambda f: spoil(f, image=np.full((3, 28, 20), np.nan)), r"frame01\.h5: holds intensities that are NaN"),
    "negative": (lambda f: spoil(f, label=np.full((3, 28, 20), -1)), r"labels must be whole numbers from 0, got -1"),
    "instances": (
        lambda f: spoil(f, label=np.arange(3 * 28 * 20).reshape(3, 28, 20)),
        r"patient002_frame01\.h5: has 1680 label values and the folder 1680, which are more than 32 classes",
    ),
    "not there": (
        lambda f: write_lists(f, test=["patient099_frame01"]),
        r"patient099_frame01\.h5: no such file, but a test list of .* names it",
    ),
    "two lists": (
        lambda f: write_lists(f, train=["patient001_frame01"], val=["patient001_frame09"]),
        "subject patient001 is named for train and for val",
    ),
    "empty list": (lambda f: write_lists(f, val=[]), r"val\.list: names no case"),
    "no text": (lambda f: (f / "val.list").write_bytes(b"\xff\xfe"), r"val\.list: is no text"),
    "other size": (
        lambda f: save_h5(
            f / "data/slices/patient001_frame01_slice_2.h5", image=np.zeros((28, 24)), label=np.zeros((28, 24))
        ),
        r"patient001_frame01_slice_2\.h5: is 28 x 24, patient001_frame01_slice_1\.h5 of the same volume 28 x 20",
    ),
    "one slice twice": (
        lambda f: save_h5(f / "data/patient001_frame01_slice02.h5", image=np.zeros((28, 20)), label=np.zeros((28, 20))),
        r"patient001_frame01_slice_2\.h5: is slice 2 of patient001_frame01, and so is patient001_frame01_slice02\.h5",
    ),
    "a deep slice": (
        lambda f: spoil(f, "slices/patient001_frame01_slice_2"),
        r"patient001_frame01_slice_2\.h5: is named as one slice and holds 3",
    ),
    "slice and volume": (
        lambda f: write_lists(f, val=["patient001_frame01", "patient001_frame01_slice_2"]),
        r"patient001_frame01: a list names it and slices of it",
    ),
    "no file": (lambda f: shutil.rmtree(f / "data"), "neither dataset.json"),
}


@pytest.mark.parametrize("name", BAD_H5)
def test_bad_h5_folders(tmp_path, name):
    breaks, message = BAD_H5[name]
    breaks(write_h5(tmp_path, by_slice=name in ("other size", "one slice twice", "a deep slice", "slice and volume")))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_without_a_class(tmp_path):
    for number in range(3):
        spoil(tmp_path, f"case{number}", label=np.zeros((3, 28, 20)))
    with pytest.raises(DataError, match="all labels are 0, no class to learn"):
        read_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------- pictures


def test_pictures_and_masks(tmp_path):
    slices = read_folder(write_pictures(tmp_path, values=(0, 127, 255)))
    assert slices.source["layout"] == "images and masks" and slices.source["label_values"] == [0, 127, 255]
    assert slices.classes == ("background", "class 127", "class 255")
    assert slices.images.shape == (6, 1, 48, 32) and slices.ids[0] == "p0/000"
    assert slices.subjects == [f"p{n}" for n in range(6)] and len(set(slices.planes.tolist())) == 6
    image, label = volume(2, (40, 30, 1), 3)
    image = image.clip(0, 255).astype(np.uint8).astype(np.float32)
    inside = slices.images[2, 0, 4:44, 1:31]
    assert torch.allclose(inside, torch.from_numpy((image - image.mean()) / image.std())[..., 0], atol=1e-5)
    assert torch.equal(slices.labels[2, 4:44, 1:31], torch.from_numpy(label)[..., 0])


def test_a_picture_has_x_to_the_right_and_y_upwards(tmp_path):
    for number in range(3):
        rows = np.zeros((32, 48, 3), np.uint8)
        rows[0, 47] = (30, 20, 10)  # the upper right corner
        mask = np.zeros((32, 48), np.uint8)
        mask[0, 47] = 1
        Image.fromarray(rows).save(tmp_path / f"p{number}.png")
        Image.fromarray(mask).save(tmp_path / f"p{number}_mask.png")
    slices = read_folder(tmp_path)
    assert slices.images.shape == (3, 3, 48, 32), "RGB"
    assert slices.labels[0].nonzero().tolist() == [[47, 31]]
    assert (slices.images[0].flatten(1).argmax(1) == 47 * 32 + 31).all()


def test_kinds_of_pictures(tmp_path):
    write_pictures(tmp_path, masks="masks", ending="_mask")
    for path in (tmp_path / "images").iterdir():
        Image.open(path).convert("LA").save(path)
    for number, mode in enumerate(("1", "P", "RGB", "RGBA", "I;16")):
        path = tmp_path / "masks" / f"p{number}_mask.png"
        mask = np.asarray(Image.open(path)) // 255  # the same classes as 255 has in the sixth
        picture = Image.fromarray(mask.astype(np.uint16 if mode == "I;16" else np.uint8))
        if mode == "1":
            picture = Image.fromarray(mask.astype(bool))
        elif mode == "P":
            picture.putpalette([0, 0, 0, 200, 10, 10])
        elif mode != "I;16":
            picture = picture.convert(mode)
        picture.save(path)
    (tmp_path / "images/p5.png").unlink()
    slices = read_folder(tmp_path)
    assert slices.source["label_values"] == [0, 1] and slices.images.shape[1] == 3
    for number in range(5):
        _, label = volume(number, (40, 30, 1), 2)
        assert torch.equal(slices.labels[number, 4:44, 1:31], torch.from_numpy(label)[..., 0]), number


@pytest.mark.parametrize(("kind", "mask_kind"), [("tif", "tiff"), ("jpg", "gif"), ("bmp", "png"), ("JPEG", "PNG")])
def test_kinds_of_files(tmp_path, kind, mask_kind):
    slices = read_folder(write_pictures(tmp_path / "a", kind=kind, mask_kind=mask_kind))
    plain = read_folder(write_pictures(tmp_path / "b"))
    assert torch.equal(slices.labels, plain.labels) and slices.ids == plain.ids
    assert (slices.images - plain.images).abs().mean() < (0.5 if kind in ("jpg", "JPEG") else 1e-6)


@pytest.mark.parametrize("mask_kind", ["gif", "tif", "bmp"])
def test_masks_that_lack_a_value(tmp_path, mask_kind):
    """A palette is a file's own: the number of its last colour says nothing about the class."""
    plain = write_pictures(tmp_path / "png", values=(0, 127, 255))
    other = write_pictures(tmp_path / "other", values=(0, 127, 255), mask_kind=mask_kind)
    for folder, kind in ((plain, "png"), (other, mask_kind)):
        whole = np.full((30, 40), 255, np.uint8)
        Image.fromarray(whole).save(folder / "masks" / f"p2.{kind}")
    assert torch.equal(read_folder(plain).labels, read_folder(other).labels)
    assert read_folder(other).source["label_values"] == [0, 127, 255]


def test_a_jpeg_is_no_mask(tmp_path):
    write_pictures(tmp_path, mask_kind="jpg")
    with pytest.raises(DataError, match=r"masks/p0\.jpg: is a JPEG, which does not keep the values of a mask"):
        read_folder(tmp_path)


def test_other_folders_that_hold_images_do_not_matter(tmp_path):
    for name, write in (("ACDC", write_acdc), ("images and masks", write_pictures), ("h5 volumes", write_h5)):
        folder = write(tmp_path / name)
        (folder / "docs/images").mkdir(parents=True)
        (folder / "more/images").mkdir(parents=True)
        (folder / "more/masks").mkdir()
        assert recognise(folder).name == name


def test_instances_are_merged(tmp_path):
    slices = read_folder(write_instances(tmp_path))
    assert slices.source["layout"] == "images and instances" and slices.classes == ("background", "foreground")
    assert slices.images.shape[1] == 3 and slices.ids[0] == "n0/000"
    _, label = volume(0, (40, 30, 1), 4)
    assert int((slices.labels[0] == 1).sum()) == int((label > 0).sum())


BAD_INSTANCES = {
    "no mask": (lambda f: shutil.rmtree(f / "n1/masks"), r"n1/masks: holds no mask of an instance"),
    "two pictures": (
        lambda f: shutil.copy(f / "n1/images/n1.png", f / "n1/images/n2.png"),
        r"n1/images: must hold one picture, got 2",
    ),
    "other size": (
        lambda f: Image.new("L", (10, 10)).save(f / "n1/masks/n12.png"),
        r"n1/masks/n12\.png: has shape \(10, 10, 1\), its image n1\.png \(40, 30, 1\)",
    ),
    "damaged": (lambda f: (f / "n1/masks/n11.png").write_bytes(b"no"), r"n11\.png: cannot be read as a picture"),
    "a damaged TIFF": (
        lambda f: (f / "n1/masks/n14.tif").write_bytes(b"II*\0\x08\0\0\0\0\0\0\0\0\0"),
        r"n14\.tif: cannot be read as a picture",
    ),
}


@pytest.mark.parametrize("name", BAD_INSTANCES)
def test_bad_instances(tmp_path, name):
    breaks, message = BAD_INSTANCES[name]
    breaks(write_instances(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_hold_several_pictures_or_share_a_name(tmp_path):
    write_pictures(tmp_path)
    pages = [Image.new("L", (40, 30)), Image.new("L", (40, 30))]
    (tmp_path / "images/p2.png").unlink()
    pages[0].save(tmp_path / "images/p2.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"p2\.tif: holds 2 pictures, must hold one"):
        read_folder(tmp_path)
    shutil.copy(tmp_path / "images/p1.png", tmp_path / "images/p1.bmp")
    with pytest.raises(DataError, match=r"p1\.png: has the name of p1\.bmp"):
        read_folder(tmp_path)


def test_large_pictures_are_scaled_down(tmp_path):
    write_pictures(tmp_path, count=4, size=(400, 300))
    slices = read_folder(tmp_path)
    assert slices.images.shape == (4, 1, 160, 128) and slices.source["spacing"] == 2.5
    _, label = volume(0, (400, 300, 1), 2)
    assert abs(int((slices.labels[0] == 1).sum()) * 2.5**2 - label.sum()) <= 0.3 * label.sum()
    assert read_folder(tmp_path, size=(208, 160)).source["spacing"] == 400 / 208
    assert read_folder(tmp_path, size=(416, 304), spacing=1).images.shape == (4, 1, 416, 304)


def test_pictures_with_lists(tmp_path):
    slices = read_folder(write_lists(write_pictures(tmp_path), train=["p1.png", "p3"], val=["p0"], test=["p5"]))
    assert slices.parts == {"p1": "train", "p3": "train", "p0": "val", "p5": "test"}


def test_grey_and_rgb_pictures_in_one_folder(tmp_path):
    grey = read_folder(write_pictures(tmp_path))
    rng = np.random.default_rng(0)
    for number in (1, 4):
        path = tmp_path / f"images/p{number}.png"
        Image.fromarray(rng.integers(255, size=(30, 40, 3), dtype=np.uint8)).save(path)
    mixed = read_folder(tmp_path)
    assert mixed.images.shape == (6, 3, 48, 32) and mixed.source["grey_to_rgb"] == 4
    for number in (0, 2, 3, 5):
        assert torch.equal(mixed.images[number], grey.images[number].expand(3, -1, -1))
    assert not torch.equal(mixed.images[1, 0], mixed.images[1, 1])
    assert describe(mixed).endswith("; 4 grey pictures became RGB like the other 2")
    assert "RGB" not in describe(grey) and "grey_to_rgb" not in grey.source


BAD_PICTURES = {
    "damaged image": (
        lambda f: (f / "images/p2.png").write_bytes(b"no picture"),
        r"images/p2\.png: cannot be read as a picture \(cannot identify image file",
    ),
    "half an image": (
        lambda f: (f / "images/p2.png").write_bytes((f / "images/p2.png").read_bytes()[:200]),
        r"images/p2\.png: cannot be read as a picture \(",
    ),
    "damaged mask": (lambda f: (f / "masks/p2.png").write_bytes(b""), r"masks/p2\.png: cannot be read as a picture"),
    "missing mask": (lambda f: (f / "masks/p2.png").unlink(), r"images/p2\.png: has no mask .*masks/p2\.png, p2_mask"),
    "coloured mask": (
        lambda f: Image.new("RGB", (40, 30), (255, 0, 0)).save(f / "masks/p2.png"),
        r"masks/p2\.png: is coloured",
    ),
    "shapes": (
        lambda f: Image.new("L", (40, 31)).save(f / "masks/p2.png"),
        r"masks/p2\.png: has shape \(40, 31, 1\), its image p2\.png \(40, 30, 1\)",
    ),
    "photograph": (
        lambda f: Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(f / "masks/p2.png"),
        r"masks/p2\.png: has 1200 label values",
    ),
    "not there": (lambda f: write_lists(f, val=["p9"]), r"images/p9\.png: (no such file|has no mask)"),
    "no picture": (lambda f: shutil.rmtree(f / "images"), "neither dataset.json .* images/.* with masks"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(tmp_path, name):
    breaks, message = BAD_PICTURES[name]
    breaks(write_pictures(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)
