"""Real data by folder: NIfTI images and labels in the layout of the Medical Segmentation Decathlon or of ACDC.

MSD: FOLDER/dataset.json names the classes, the images and their labels (its own test images have no labels and are
left alone). ACDC: FOLDER/[training/]patientXXX/patientXXX_frameYY.nii.gz with _gt.nii.gz beside it; FOLDER/testing,
where it has labels, becomes the test part. Everything is read and checked before anything is trained.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import load_decathlon_datalist, load_decathlon_properties
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensity,
    Orientationd,
    ResizeWithPadOrCrop,
    Spacingd,
)
from torch import Tensor

from examples.data.slices import DataError, Slices
from examples.data.splits import assign_parts
from examples.networks import SMALLEST, STRIDE

ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
BANDS = 10  # slices at the same tenth of their volumes count as one plane
LARGEST = 160  # largest default side in pixels; --size gives any other


@dataclass(frozen=True)
class Case:
    """One labelled volume. `part` is set where the layout itself sets test cases apart."""

    subject: str
    name: str
    image: Path
    label: Path
    part: str | None = None


def read_folder(folder: Path, size: tuple[int, int] | None = None, spacing: float | None = None) -> Slices:
    """Reads a folder in MSD or ACDC layout into slices along the third axis.

    spacing: in-plane pixel size in mm to resample to (None: as stored for MSD, 1.5 for ACDC). size: every slice is
    centre-cropped or padded to it (None: the largest slice, 32 to 160 pixels, in multiples of 16). Raises DataError.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if (folder / "dataset.json").is_file():
        layout, classes, cases = "MSD", *list_msd(folder)
    elif any(folder.glob("patient*")) or any(folder.glob("training/patient*")):
        layout, classes, cases = "ACDC", ACDC_CLASSES, list_acdc(folder)
        spacing = 1.5 if spacing is None else spacing
    else:
        raise DataError(f"{folder}: neither dataset.json (MSD layout) nor patient* folders (ACDC layout)")
    for case in cases:
        for path in (case.image, case.label):
            if not path.is_file():
                raise DataError(f"{path}: no such file")
    if not cases:
        raise DataError(f"{folder}: no labelled case")
    volumes = [read_case(case, len(classes), spacing, layout == "MSD") for case in cases]
    channels = {case.image: len(image) for case, (image, _) in zip(cases, volumes, strict=True)}
    for path, count in channels.items():
        if count != channels[cases[0].image]:
            raise DataError(f"{path}: has {count} channels, {cases[0].image.name} has {channels[cases[0].image]}")
    if size is None:
        longest = np.max([image.shape[1:3] for image, _ in volumes], 0)
        size = tuple(int(np.clip(-(-side // STRIDE) * STRIDE, SMALLEST, LARGEST)) for side in longest)
    resize_label = ResizeWithPadOrCrop((*size, -1))
    images, labels, subjects, ids, planes = [], [], [], [], []
    for case, (image, label) in zip(cases, volumes, strict=True):
        fill = float(image.min())
        images.append(ResizeWithPadOrCrop((*size, -1), constant_values=fill)(image).permute(3, 0, 1, 2))
        labels.append(resize_label(label)[0].permute(2, 0, 1).to(torch.uint8))
        depth = image.shape[3]
        subjects += [case.subject] * depth
        ids += [f"{case.name}/{z:03d}" for z in range(depth)]
        planes += [z * BANDS // depth for z in range(depth)]
    return Slices(
        images=torch.cat(images).float().contiguous(),
        labels=torch.cat(labels).contiguous(),
        subjects=subjects,
        ids=ids,
        planes=torch.tensor(planes),
        zones=[""] * len(ids),
        parts=parts_of(cases),
        classes=classes,
        source={"layout": layout, "folder": folder.name, "spacing": spacing, "cases": len(cases)},
    )


def list_msd(folder: Path) -> tuple[tuple[str, ...], list[Case]]:
    """The class names and the labelled cases of dataset.json."""
    index = folder / "dataset.json"
    try:
        names = load_decathlon_properties(index, "labels")["labels"]
        entries = load_decathlon_datalist(index, True, "training", folder)
        classes = tuple(str(names[str(number)]) for number in range(len(names)))
        images = [(Path(entry["image"]), Path(entry["label"])) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{index}: not an MSD index with labels 0, 1, ... and training cases ({reason})") from error
    if len(classes) < 2:
        raise DataError(f"{index}: needs a background and at least one other class, got {classes}")
    stems = [image.name.removesuffix(".gz").removesuffix(".nii") for image, _ in images]
    return classes, [Case(stem, stem, image, label) for stem, (image, label) in zip(stems, images, strict=True)]


def list_acdc(folder: Path) -> list[Case]:
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
                    cases.append(Case(patient.name, stem, image, label, part))
    return cases


def parts_of(cases: list[Case]) -> dict[str, str]:
    """Each subject's part; where the layout names the test cases, the rest are split without drawing further ones."""
    tests = {case.subject for case in cases if case.part == "test"}
    rest = sorted({case.subject for case in cases} - tests)
    parts = assign_parts(rest)
    if tests:
        parts = {subject: "train" if part == "test" else part for subject, part in parts.items()}
    return parts | dict.fromkeys(tests, "test")


def read_case(case: Case, num_classes: int, spacing: float | None, reorient: bool) -> tuple[Tensor, Tensor]:
    """One case as image [C, X, Y, Z], normalised over the volume, and label [1, X, Y, Z]. Raises DataError."""
    keys = ("image", "label")
    try:
        volume = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])({"image": case.image, "label": case.label})
    except Exception as error:  # nibabel and zlib raise many kinds for a damaged file; which of the two, they name
        raise DataError(f"{case.image} or its label {case.label}: cannot be read ({first_line(error)})") from error
    check_case(case, volume["image"], volume["label"], num_classes)
    steps: list = [Orientationd(keys, axcodes="RAS", labels=None)] if reorient else []
    if spacing is not None:
        steps.append(Spacingd(keys, pixdim=(spacing, spacing, 0.0), mode=("bilinear", "nearest")))
    steps.append(EnsureTyped(keys, track_meta=False))
    volume = Compose(steps)(volume)
    return NormalizeIntensity(channel_wise=True)(volume["image"].float()), volume["label"].float()


def check_case(case: Case, image: Tensor, label: Tensor, num_classes: int) -> None:
    """Raises DataError, naming the file, for what cannot be trained on."""
    if image.ndim != 4:
        raise DataError(f"{case.image}: must be a 3-D volume (with channels last, if any), got {tuple(image.shape)}")
    if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
        raise DataError(
            f"{case.label}: has shape {tuple(label.shape[1:])}, its image {case.image.name} {tuple(image.shape[1:])}"
        )
    if not torch.isfinite(image).all():
        raise DataError(f"{case.image}: holds intensities that are NaN or infinite")
    found = torch.unique(label).tolist()
    wrong = [value for value in found if value not in range(num_classes)]
    if wrong:
        raise DataError(f"{case.label}: labels must be whole numbers from 0 to {num_classes - 1}, got {wrong[0]:g}")
    if found == [0]:
        raise DataError(f"{case.label}: all background, no class to learn")


def first_line(error: Exception) -> str:
    """The first non-empty line of an error's innermost cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
