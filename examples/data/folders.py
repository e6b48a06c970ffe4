"""Real data by folder: recognises the layout by its files and hands its cases over as slices or as volumes.

`nifti.py` (MSD, ACDC), `h5.py` and `pictures.py` say what each layout looks like. Everything is read and checked before
anything is trained.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.transforms import ResizeWithPadOrCrop
from torch import Tensor

from examples.data.h5 import find_h5, find_la
from examples.data.layout import Case, Layout, Volume, check_subjects, with_subjects
from examples.data.nifti import find_acdc, find_msd, find_nnunet
from examples.data.pictures import find_nested, find_pictures
from examples.data.slices import DataError, Slices
from examples.data.splits import assign_parts
from examples.data.volumes import Volumes, pad
from examples.networks import SMALLEST, STRIDE

BANDS = 10  # slices at the same tenth of their volumes count as one plane
LARGEST = 160  # largest default side in pixels; --size gives any other
FINDERS = (find_nnunet, find_msd, find_la, find_acdc, find_h5, find_pictures, find_nested)
MOST_VALUES = 32  # of labels in a folder that does not name its classes; more are instances or a photograph


def recognise(folder: Path) -> Layout:
    """The layout of a folder, told by its files. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for find in FINDERS:
        layout = find(folder)
        if layout is not None:
            return layout
    raise DataError(
        f"{folder}: neither dataset.json (MSD, nnU-Net) nor patient* folders (ACDC), */mri_norm2.h5 (LA), "
        "[data/][slices/]*.h5, images/* with masks/*, or */images with */masks (instances)"
    )


def read_folder(
    folder: Path, size: tuple[int, int] | None = None, spacing: float | None = None, subject: str | None = None
) -> Slices:
    """Reads a folder of any known layout into slices along the third axis.

    spacing: in-plane pixel size in mm to resample to (None: as stored, for ACDC 1.5; pictures are scaled down to fit;
    where files state no mm, a pixel counts as 1). size: every slice is centre-cropped or padded to it (None: the
    largest slice, 32 to 160 pixels, in multiples of 16). subject: a pattern; what it first matches in a case's name is
    the subject (None: the name without slice, frame, visit and the like). Raises DataError.
    """
    layout, volumes, source = read_cases(folder, size or (LARGEST, LARGEST), spacing, subject)
    if size is None:
        longest = np.max([volume.image.shape[1:3] for volume in volumes], 0)
        size = tuple(int(np.clip(-(-side // STRIDE) * STRIDE, SMALLEST, LARGEST)) for side in longest)
    resize_label = ResizeWithPadOrCrop((*size, -1))
    single = all(volume.image.shape[3] == 1 for volume in volumes)  # pictures: none is like another
    images, labels, subjects, ids, planes, stored = [], [], [], [], [], []
    for number, (case, (image, label, _)) in enumerate(zip(layout.cases, volumes, strict=True)):
        fill = float(image.min())
        images.append(ResizeWithPadOrCrop((*size, -1), constant_values=fill)(image).permute(3, 0, 1, 2))
        labels.append(resize_label(label)[0].permute(2, 0, 1).to(torch.uint8))
        depth = image.shape[3]
        subjects += [case.subject] * depth
        ids += [f"{case.name}/{z:03d}" for z in case.numbers or range(depth)]
        planes += [number] if single else [z * BANDS // depth for z in range(depth)]
        stored += [tuple(map(min, image.shape[1:3], size))] * depth
    foreground = sum(int((volume.label > 0).sum()) for volume in volumes)
    if not foreground:
        raise DataError(f"{folder}: no pixel of a class is left at a spacing of {source['spacing']:g}")
    source["foreground_outside"] = round(1 - sum(int((label > 0).sum()) for label in labels) / foreground, 4)
    return Slices(
        images=torch.cat(images).float().contiguous(),
        labels=torch.cat(labels).contiguous(),
        subjects=subjects,
        ids=ids,
        planes=torch.tensor(planes),
        zones=[""] * len(ids),
        parts=parts_of(folder, layout.cases),
        classes=layout.classes,
        source=source,
        stored=stored,
    )


def read_volumes(
    folder: Path, patch: tuple[int, int, int], spacing: float | None = None, subject: str | None = None
) -> Volumes:
    """Reads a folder into whole volumes, padded where they are smaller than the patch. Raises DataError."""
    layout, volumes, source = read_cases(folder, (LARGEST, LARGEST), spacing, subject)
    if all(volume.image.shape[3] == 1 for volume in volumes):
        raise DataError(f"{folder}: holds pictures, no volumes; leave --volumes out")
    return Volumes(
        images=[pad(volume.image, patch, float(volume.image.min())) for volume in volumes],
        labels=[pad(volume.label, patch, 0)[0].to(torch.uint8) for volume in volumes],
        subjects=[case.subject for case in layout.cases],
        ids=[case.name for case in layout.cases],
        planes=torch.arange(len(volumes)),
        zones=[""] * len(volumes),
        parts=parts_of(folder, layout.cases),
        classes=layout.classes,
        source=source,
        stored=[tuple(volume.label.shape[1:]) for volume in volumes],
        patch=patch,
    )


def read_cases(
    folder: Path, size: tuple[int, int], spacing: float | None, subject: str | None
) -> tuple[Layout, list[Volume], dict]:
    """The layout, with its classes; its volumes, with class ids for labels; and what the results say of the source."""
    layout = recognise(folder)
    for case in layout.cases:
        for path in case.files:
            if not path.is_file():
                raise DataError(f"{path}: no such file")
    if not layout.cases:
        raise DataError(f"{folder}: no labelled case")
    if subject is not None:
        layout = replace(layout, cases=with_subjects(layout.cases, subject))
    elif {"val", "test"} - {case.part for case in layout.cases}:  # a part is drawn, subject by subject
        check_subjects(folder, [case.subject for case in layout.cases])
    if spacing is None and layout.largest is not None:
        spacing = max(1.0, *(side / limit for side, limit in zip(layout.largest, size, strict=True)))
    spacing = layout.spacing if spacing is None else spacing
    volumes = [layout.read(case, spacing) for case in layout.cases]
    source = {"layout": layout.name, "folder": folder.name, "spacing": spacing, "cases": len(layout.cases)}
    if layout.rgb and {len(volume.image) for volume in volumes} == {1, 3}:
        source["grey_to_rgb"] = sum(len(volume.image) == 1 for volume in volumes)
        volumes = [volume._replace(image=volume.image.expand(3, -1, -1, -1)) for volume in volumes]
    for case, volume in zip(layout.cases, volumes, strict=True):
        if len(volume.image) != len(volumes[0].image):
            first, channels = layout.cases[0].files[0].name, len(volumes[0].image)
            raise DataError(f"{case.files[0]}: has {len(volume.image)} channels, {first} has {channels}")
    spacings = {case.name: list(v.spacing) for case, v in zip(layout.cases, volumes, strict=True) if v.spacing}
    if spacings:
        source["spacing_mm"] = spacings
    if not layout.classes:
        values = label_values(folder, layout.cases, [volume.label for volume in volumes])
        volumes = [v._replace(label=torch.searchsorted(values, v.label.contiguous()).float()) for v in volumes]
        source["label_values"] = [int(value) for value in values]
        names = ("background", *(f"class {value}" for value in source["label_values"][1:]))
        layout = replace(layout, classes=names)
    return layout, volumes, source


def label_values(folder: Path, cases: list[Case], labels: list[Tensor]) -> Tensor:
    """All values in ascending order: they become classes 0, 1, ..., the smallest the background. Raises DataError."""
    found = [torch.unique(label) for label in labels]
    values = torch.unique(torch.cat(found))
    if len(values) > MOST_VALUES:
        worst = max(range(len(found)), key=lambda i: len(found[i]))
        raise DataError(
            f"{cases[worst].files[-1]}: has {len(found[worst])} label values and the folder {len(values)}, which are "
            f"more than {MOST_VALUES} classes"
        )
    if len(values) < 2:
        raise DataError(f"{folder}: all labels are {values[0]:g}, no class to learn")
    return values


def parts_of(folder: Path, cases: list[Case]) -> dict[str, str]:
    """Each subject's part: as the layout names it; validation and test parts that it does not name are drawn."""
    named: dict[str, str] = {}
    for case in cases:
        if case.part is not None and named.setdefault(case.subject, case.part) != case.part:
            raise DataError(f"{folder}: subject {case.subject} is named for {named[case.subject]} and for {case.part}")
    free = sorted({case.subject for case in cases} - {name for name, part in named.items() if part != "train"})
    missing = {"val", "test"} - set(named.values())
    drawn = assign_parts(free) if missing else dict.fromkeys(free, "train")
    return named | {subject: part if part in missing else "train" for subject, part in drawn.items()}
