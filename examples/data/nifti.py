"""NIfTI volumes in the layout of the Medical Segmentation Decathlon or of ACDC.

MSD: FOLDER/dataset.json names the classes, the images and their labels (its own test images have no labels and are
left alone). ACDC: FOLDER/[training/]patientXXX/patientXXX_frameYY.nii.gz with _gt.nii.gz beside it; FOLDER/testing,
where it has labels, becomes the test part.
"""

from collections import Counter
from functools import partial
from pathlib import Path

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

ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")


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
    """One case, its image normalised over the volume. Raises DataError."""
    keys, (image_file, label_file) = ("image", "label"), case.files
    try:
        volume = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])({"image": image_file, "label": label_file})
    except Exception as error:  # nibabel and zlib raise many kinds for a damaged file; which of the two, they name
        raise DataError(f"{image_file} or its label {label_file}: cannot be read ({first_line(error)})") from error
    if volume["image"].ndim != 4:
        shape = tuple(volume["image"].shape)
        raise DataError(f"{image_file}: must be a 3-D volume (with channels last, if any), got {shape}")
    check_pair(image_file, label_file, volume["image"], volume["label"], num_classes)
    steps: list = [Orientationd(keys, axcodes="RAS", labels=None)] if reorient else []
    if spacing is not None:
        steps.append(Spacingd(keys, pixdim=(spacing, spacing, 0.0), mode=("bilinear", "nearest")))
    volume = Compose(steps)(volume)
    mm = tuple(round(float(side), 4) for side in volume["image"].pixdim)
    volume = EnsureTyped(keys, track_meta=False)(volume)
    return Volume(NormalizeIntensity(channel_wise=True)(volume["image"].float()), volume["label"].float(), mm)
