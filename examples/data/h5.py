"""HDF5 files as the benchmarks of semi-supervised segmentation keep them (ACDC of SSL4MIS): datasets `image`, `label`.

Per slice: FOLDER/[data/]slices/patient001_frame01_slice_1.h5, [H, W]; the slices of a volume are put together again.
Per volume: FOLDER/[data/]patient001_frame01.h5, [Z, H, W]. FOLDER/train_slices.list (slices), train.list, val.list and
test.list (volumes) name the parts, where they exist: then what no list names is left out. Subjects are told by name:
what stands before _frame.
"""

import re
from pathlib import Path

import h5py
import numpy as np
import torch
from monai.transforms import NormalizeIntensity
from torch import Tensor

from examples.data.layout import Case, Layout, Volume, check_pair, first_line, from_rows, read_lists, rescaled
from examples.data.slices import DataError

KEYS = ("image", "label")
SLICE_LIST = "train_slices.list"
SLICE = re.compile(r"(.+)_slice_?(\d+)")
FRAME = re.compile(r"_frame_?\d+$")


def find_h5(folder: Path) -> Layout | None:
    """The cases that the lists name, or all of them; training cases from slices/ where there is such a folder."""
    home = folder / "data" if (folder / "data").is_dir() else folder
    volumes = {path.stem: [path] for path in sorted(home.glob("*.h5"))}
    slices = {path.stem: [path] for path in sorted((home / "slices").glob("*.h5"))}
    if not volumes and not slices:
        return None
    stacks: dict[str, list[Path]] = {}
    for name, files in slices.items():
        stacks.setdefault(place(name)[0], []).extend(files)
    lists = read_lists(folder)
    if slices and (folder / SLICE_LIST).is_file():
        lists |= read_lists(folder, train=SLICE_LIST)
    known = slices | stacks | volumes
    cases = []
    for part, names in lists.items():
        listed: dict[str, list[Path]] = {}
        for name in names:
            if name not in known:
                raise DataError(f"{home / name}.h5: no such file, but a {part} list of {folder} names it")
            listed.setdefault(place(name)[0], []).extend(known[name])
        cases += [make_case(name, files, part) for name, files in listed.items()]
    if not lists:
        cases = [make_case(name, files) for name, files in (stacks or volumes).items()]
    by_slice = any(path.parent.name == "slices" for case in cases for path in case.files)
    return Layout("h5 slices" if by_slice else "h5 volumes", cases, read_h5)


def place(name: str) -> tuple[str, int]:
    """A slice's volume and its number in it; a volume's own name and 0."""
    match = SLICE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def make_case(name: str, files: list[Path], part: str | None = None) -> Case:
    """A volume out of its one file, or of its slices in the order of their numbers."""
    ordered = sorted(files, key=lambda path: place(path.stem))
    numbers = tuple(place(path.stem)[1] for path in ordered) if SLICE.fullmatch(ordered[0].stem) else None
    return Case(FRAME.sub("", name), name, tuple(ordered), part, numbers)


def read_h5(case: Case, spacing: float | None) -> Volume:
    """One case, its image normalised over the volume. The files state no mm: a pixel counts as 1. Raises DataError."""
    pairs = [read_file(path) for path in case.files]
    sizes = [f"{image.shape[2]} x {image.shape[1]}" for image, _ in pairs]
    for path, size in zip(case.files, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(f"{path}: is {size}, {case.files[0].name} of the same volume {sizes[0]}")
    image, label = (torch.cat(parts, 3) for parts in zip(*pairs, strict=True))
    return rescaled(NormalizeIntensity(channel_wise=True)(image), label, spacing)


def read_file(path: Path) -> tuple[Tensor, Tensor]:
    """Image and label [1, X, Y, Z] of one file."""
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in KEYS if key not in file]
            arrays = [torch.from_numpy(np.asarray(file[key], np.float32)) for key in KEYS if key in file]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from error
    if missing:
        raise DataError(f"{path}: holds no dataset `{missing[0]}`")
    image, label = arrays
    if image.ndim not in (2, 3):
        raise DataError(f"{path}: `image` must be a slice [H, W] or a volume [Z, H, W], got {tuple(image.shape)}")
    check_pair(path, path, image[None], label[None], None)
    image, label = (from_rows(array.view(-1, *array.shape[-2:])).permute(1, 2, 0)[None] for array in (image, label))
    return image, label
