"""NIfTI volumes in the layout of the Medical Segmentation Decathlon, of nnU-Net or of ACDC.

MSD: FOLDER/dataset.json names the classes, the images and their labels (its own test images have no labels and are
left alone). nnU-Net: FOLDER/dataset.json names classes and channels; the cases are FOLDER/imagesTr/CASE_0000.nii.gz,
CASE_0001 for a second channel and so on, with FOLDER/labelsTr/CASE.nii.gz. ACDC:
FOLDER/[training/]patientXXX/patientXXX_frameYY.nii.gz with _gt.nii.gz beside it; FOLDER/testing, where it has labels,
becomes the test part.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from monai.data import load_decathlon_datalist, load_decathlon_properties
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensity,
    Orientationd,
    Spacingd,
)

from examples.data.layout import Case, Layout, Volume, check_pair, first_line, subject_of
from examples.data.slices import DataError
from examples.files import read_json

AFFINE = 1e-2  # mm by which entries of two headers of one place may differ
ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")


def find_nnunet(folder: Path) -> Layout | None:
    """The class names and channels of dataset.json, and the cases whose images end with a channel's number."""
    index = folder / "dataset.json"
    if not index.is_file() or not any(folder.glob("imagesTr/*_0000.*")):
        return None
    content = read_json(index)
    if not isinstance(content, dict) or is_msd(folder, content):
        return None
    ending = content.get("file_ending", ".nii.gz")
    names = [path.name.removesuffix(f"_0000{ending}") for path in sorted(folder.glob(f"imagesTr/*_0000{ending}"))]
    if not names:
        return None
    channels, labels = content.get("channel_names", content.get("modality")), content.get("labels")
    if not (isinstance(channels, dict) and channels and isinstance(labels, dict)):
        raise DataError(f"{index}: must name `channel_names` and `labels`")
    if "ignore" in labels:
        raise DataError(f"{index}: has a label `ignore`, which the trainer does not know")
    by_name = "background" in labels  # version 2; in version 1 numbers are the keys
    try:
        values = {int(value if by_name else key): str(key if by_name else value) for key, value in labels.items()}
        classes = tuple(values[number] for number in range(len(labels)))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{index}: labels must be numbered 0, 1, ..., one class each, got {labels}") from error
    if len(classes) < 2:
        raise DataError(f"{index}: needs a background and at least one other class, got {classes}")
    cases = []
    for name in names:
        images = [folder / "imagesTr" / f"{name}_{number:04d}{ending}" for number in range(len(channels))]
        cases.append(Case(subject_of(name), name, (*images, folder / "labelsTr" / f"{name}{ending}")))
    return Layout("nnU-Net", cases, partial(read_nifti, num_classes=len(classes), reorient=True), classes)


def is_msd(folder: Path, content: dict) -> bool:
    """Whether the index names files that are there. nnU-Net's first version names them without a channel's number."""
    entries = content.get("training") or [None]
    first = entries[0].get("image") if isinstance(entries, list) and isinstance(entries[0], dict) else None
    return isinstance(first, str) and (folder / first).is_file()


def find_msd(folder: Path) -> Layout | None:
    """The class names and the labelled cases of dataset.json."""
    index = folder / "dataset.json"
    if not index.is_file():
        return None
    try:
        names = load_decathlon_properties(index, "labels")["labels"]
        entries = load_decathlon_datalist(index, True, "training", folder)
        classes = tuple(str(names[str(number)]) for number in range(len(names)))
        files = [(Path(entry["image"]), Path(entry["label"])) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{index}: not an MSD index with labels 0, 1, ... and training cases ({reason})") from error
    if len(classes) < 2:
        raise DataError(f"{index}: needs a background and at least one other class, got {classes}")
    stems = [image.name.removesuffix(".gz").removesuffix(".nii") for image, _ in files]
    for stem, count in Counter(stems).items():
        if count > 1:
            raise DataError(f"{index}: two training cases are called {stem}")
    cases = [Case(subject_of(stem), stem, pair) for stem, pair in zip(stems, files, strict=True)]
    return Layout("MSD", cases, partial(read_nifti, num_classes=len(classes), reorient=True), classes)


def find_acdc(folder: Path) -> Layout | None:
    """The frames that have a label; those under testing/ form the test part."""
    cases = []
    for root, part in ((folder, None), (folder / "training", None), (folder / "testing", "test")):
        for patient in sorted(path for path in root.glob("patient*") if path.is_dir()):
            if (patient / "images").is_dir():
                continue  # a picture with its instances
            frames = sorted(p for p in patient.glob("*_frame*.nii*") if "_gt" not in p.name)
            if not frames:
                raise DataError(f"{patient}: holds no {patient.name}_frame*.nii.gz")
            for image in frames:
                stem, dot, suffix = image.name.partition(".")
                label = image.with_name(f"{stem}_gt{dot}{suffix}")
                if part != "test" or label.is_file():
                    cases.append(Case(patient.name, stem, (image, label), part))
    read = partial(read_nifti, num_classes=len(ACDC_CLASSES), reorient=False)
    return Layout("ACDC", cases, read, ACDC_CLASSES, spacing=1.5) if cases else None


def read_nifti(case: Case, spacing: float | None, num_classes: int, reorient: bool) -> Volume:
    """One case, each channel of its image normalised over the volume. Raises DataError.

    An image of several files has a channel in each; one file may hold several, too.
    """
    *image_files, label_file = case.files
    images = [f"image {path.name}" for path in image_files]
    keys = [*images, "label"]
    try:
        volume = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])(dict(zip(keys, case.files, strict=True)))
    except Exception as error:  # nibabel and zlib raise many kinds for a damaged file; which of them, they name
        named = " and ".join(path.name for path in image_files[1:])
        raise DataError(
            f"{image_files[0]}{' or ' + named if named else ''} or its label {label_file}: cannot be read"
            f" ({first_line(error)})"
        ) from error
    for path, key in zip(image_files, images, strict=True):
        if volume[key].ndim != 4:
            shape = tuple(volume[key].shape)
            raise DataError(f"{path}: must be a 3-D volume (with channels last, if any), got {shape}")
        check_pair(path, label_file, volume[key], volume["label"], num_classes)
        # Each is turned by its own header: of other headers the label would lie elsewhere.
        if not torch.allclose(volume[key].affine, volume["label"].affine, atol=AFFINE):
            raise DataError(f"{label_file}: lies elsewhere than {path.name} by their headers (affine matrices)")
    steps: list = [Orientationd(keys, axcodes="RAS", labels=None)] if reorient else []
    if spacing is not None:
        modes = (*("bilinear" for _ in images), "nearest")
        steps.append(Spacingd(keys, pixdim=(spacing, spacing, 0.0), mode=modes))
    volume = Compose(steps)(volume)
    mm = tuple(round(float(side), 4) for side in volume[images[0]].pixdim)
    volume = EnsureTyped(keys, track_meta=False)(volume)
    image = torch.cat([volume[key].float() for key in images])
    return Volume(NormalizeIntensity(channel_wise=True)(image), volume["label"].float(), mm)
