"""What the readers of all folder layouts share: a case, a recognised folder, and the checks of what was read.

Axes. A volume is [C, X, Y, Z]: X runs to the right of a picture, Y upwards, Z over the slices; a picture is a volume of
one slice. Files that store rows from the top (.h5, PNG) are turned into that.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.data.slices import PARTS, DataError

# What follows a subject's name: a slice, a frame, a visit, a view or an eye. All of these show one subject.
OF_A_SUBJECT = re.compile(
    r"[_-](?:"
    r"(?:slice|z|frame|phase|time|timepoint|tp?|ses|session|visit|day|week|month|year|run|scan|view)[_-]?\d+"
    r"|e[ds]|[234]ch|[sl]a|left|right|o[ds]|[lr]|baseline|follow-?up|pre|post"
    r")(?![^\W_]).*|(?<=\d)[lr]$",
    re.IGNORECASE,
)
# How a list may name a case's file, behind the case's name.
SUFFIX = re.compile(r"(?:/mri_norm2)?\.h5$|\.(?:png|tiff?|jpe?g|gif|bmp)$", re.IGNORECASE)
BIDS_SUBJECT = re.compile(r"sub-[^\W_]+")
NUMBERED = re.compile(r"(.*\d.*)[_-]\d+")  # patient001_2: the second number may be a part of the first


class Volume(NamedTuple):
    """Image [C, X, Y, Z], normalised, and label [1, X, Y, Z] as stored, both float32; mm along the axes if known."""

    image: Tensor
    label: Tensor
    spacing: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One labelled volume and its files, the label last. `part` where the folder itself names it; `numbers`: of its
    slices, where they are not simply counted from 0."""

    subject: str
    name: str
    files: tuple[Path, ...]
    part: str | None = None
    numbers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """A recognised folder. `read` gives a case at an in-plane spacing (None: as stored); `classes` is empty where the
    folder does not name them; `spacing` is the default; `largest` the largest picture, where sizes have no unit. `rgb`:
    images of one channel among images of three are grey pictures."""

    name: str
    cases: list[Case]
    read: Callable[[Case, float | None], Volume]
    classes: tuple[str, ...] = ()
    spacing: float | None = None
    largest: tuple[int, int] | None = None
    rgb: bool = False


def subject_of(name: str) -> str:
    """The subject that a case's name tells: patient003 of patient003_frame01_slice_7, sub-01 of sub-01_ses-02_T1w."""
    bids = BIDS_SUBJECT.match(name)
    return bids[0] if bids else OF_A_SUBJECT.sub("", name)


def with_subjects(cases: list[Case], pattern: str) -> list[Case]:
    """The cases, the subject of each what `pattern` first matches in its name. Raises DataError."""
    found = []
    for case in cases:
        match = re.search(pattern, case.name)
        if not match or not match[0]:
            raise DataError(f"--subject {pattern}: matches nothing in {case.name}")
        found.append(replace(case, subject=match[0]))
    return found


def check_subjects(folder: Path, subjects: Iterable[str]) -> None:
    """Raises DataError where names leave open which files show one subject: 1_1, 1_2, 2_1, 2_2."""
    stems: dict[str, list[str]] = {}
    for name in sorted(set(subjects)):
        if match := NUMBERED.fullmatch(name):
            stems.setdefault(match[1], []).append(name)
    twins = next((names for names in stems.values() if len(names) > 1), None)
    if twins and len(stems) > 1:
        raise DataError(
            f"{folder}: {twins[0]} and {twins[1]} may be one subject: --subject PATTERN says which part of a name is "
            "the subject ('.+(?=[_-])' without the last number, '.+' all of it)"
        )


def check_pair(image_file: Path, label_file: Path, image: Tensor, label: Tensor, num_classes: int | None) -> None:
    """Raises DataError, naming the file, for what cannot be trained on; image [C, ...] and label [1, ...]."""
    if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
        of_image = "" if label_file == image_file else f" {image_file.name}"
        raise DataError(
            f"{label_file}: has shape {tuple(label.shape[1:])}, its image{of_image} {tuple(image.shape[1:])}"
        )
    if not torch.isfinite(image).all():
        raise DataError(f"{image_file}: holds intensities that are NaN or infinite")
    found = torch.unique(label).tolist()
    top = torch.inf if num_classes is None else num_classes - 1
    wrong = [value for value in found if not (0 <= value <= top and value == int(value))]
    if wrong:
        upwards = "from 0" if num_classes is None else f"from 0 to {top}"
        raise DataError(f"{label_file}: labels must be whole numbers {upwards}, got {wrong[0]:g}")
    if num_classes is not None and found == [0]:
        raise DataError(f"{label_file}: all background, no class to learn")


def from_rows(array: Tensor) -> Tensor:
    """[..., rows from the top, columns] as [..., X, Y]."""
    return array.flip(-2).transpose(-1, -2)


def rescaled(image: Tensor, label: Tensor, spacing: float | None) -> Volume:
    """Both with pixels `spacing` times as large: the image averaged, the label by nearest neighbour."""
    if spacing is None or spacing == 1:
        return Volume(image, label)
    size = [max(1, round(side / spacing)) for side in image.shape[1:3]]
    image, label = image.permute(3, 0, 1, 2), label.permute(3, 0, 1, 2)  # slices as a batch
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    label = F.interpolate(label, size, mode="nearest-exact")
    return Volume(image.permute(1, 2, 3, 0), label.permute(1, 2, 3, 0))


def read_lists(folder: Path, **files: str) -> dict[str, list[str]]:
    """The names in train.list, val.list and test.list, one a line, where these files exist; `train="..."` is another.

    A name may end with its file's suffix. Raises DataError for a list without a name.
    """
    lists = {}
    for part in PARTS:
        path = folder / files.get(part, f"{part}.list")
        if path.is_file():
            try:
                names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: is no text ({error})") from error
            if not names:
                raise DataError(f"{path}: names no case")
            lists[part] = list(dict.fromkeys(SUFFIX.sub("", name) for name in names))
    return lists


def named_parts(folder: Path, names: list[str]) -> list[tuple[str, str | None]]:
    """The names in the folder's lists and their parts; without a training list all others of these names, too."""
    lists = read_lists(folder)
    found: list[tuple[str, str | None]] = [(name, part) for part, listed in lists.items() for name in listed]
    if "train" not in lists:
        found += [(name, None) for name in names if name not in dict(found)]
    return found


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's innermost cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
