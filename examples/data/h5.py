"""HDF5 files as the benchmarks of semi-supervised segmentation keep them (ACDC, LA): datasets `image`, `label`.

Per slice: FOLDER/[data/][slices/]patient001_frame01_slice_1.h5, [H, W]; the slices of a volume are put together again.
Per volume: FOLDER/[data/]patient001_frame01.h5, [Z, H, W]. Both may lie in one folder: the name tells which it is.
Per case: FOLDER/[any/]CASE/mri_norm2.h5, a volume [X, Y, Z] as LA is kept.
FOLDER/train_slices.list (slices), train.list, val.list and test.list (volumes) name the parts, where they exist: then
what no list names is left out, or without a list of training cases is one of these.
"""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import torch
from monai.transforms import NormalizeIntensity
from torch import Tensor

from examples.data.layout import (
    Case,
    Layout,
    Volume,
    check_pair,
    first_line,
    from_rows,
    named_parts,
    read_lists,
    rescaled,
    subject_of,
)
from examples.data.slices import DataError

KEYS = ("image", "label")
SLICE_LIST = "train_slices.list"
SLICE = re.compile(r"(.+)_slice_?(\d+)")
LA_FILE = "mri_norm2.h5"


def find_h5(folder: Path) -> Layout | None:
    """The cases that the lists name, or all of them; a volume that is stored whole and in slices is read from these."""
    home = folder / "data" if (folder / "data").is_dir() else folder
    files = {path.stem: path for path in (*sorted(home.glob("*.h5")), *sorted((home / "slices").glob("*.h5")))}
    if not files:
        return None
    stacks: dict[str, list[Path]] = {}
    for name, path in files.items():
        if SLICE.fullmatch(name):
            stacks.setdefault(place(name)[0], []).append(path)
    known = stacks | {name: [path] for name, path in files.items()}
    lists = read_lists(folder)
    if stacks and (folder / SLICE_LIST).is_file():
        lists |= read_lists(folder, train=SLICE_LIST)
    cases = []
    for part, names in lists.items():
        listed: dict[str, list[Path]] = {}
        for name in names:
            if name not in known:
                raise DataError(f"{home / name}.h5: no such file, but a {part} list of {folder} names it")
            listed.setdefault(place(name)[0], []).extend(known[name])
        cases += [make_case(name, paths, part) for name, paths in listed.items()]
    if "train" not in lists:
        whole = {name: [path] for name, path in files.items() if not SLICE.fullmatch(name)}
        named = {case.name for case in cases}
        cases += [make_case(name, paths) for name, paths in sorted((whole | stacks).items()) if name not in named]
    kinds = {"volumes" if case.numbers is None else "slices" for case in cases}
    return Layout(f"h5 {' and '.join(sorted(kinds))}", cases, read_h5)


def find_la(folder: Path) -> Layout | None:
    """A volume in each folder, all of them or those that the lists name."""
    files: dict[str, Path] = {}
    for path in sorted([*folder.glob(f"*/{LA_FILE}"), *folder.glob(f"*/*/{LA_FILE}")]):
        name = path.parent.name
        if files.setdefault(name, path) != path:
            raise DataError(f"{path}: case {name} is also in {files[name]}")
    if not files:
        return None
    cases = []
    for name, part in named_parts(folder, list(files)):
        if name not in files:
            raise DataError(f"{folder / name / LA_FILE}: no such file, but the {part} list of {folder} names it")
        cases.append(Case(name, name, (files[name],), part))
    return Layout("h5 case by case", cases, partial(read_h5, of_rows=False))


def place(name: str) -> tuple[str, int]:
    """A slice's volume and its number in it; a volume's own name and 0."""
    match = SLICE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def make_case(name: str, files: list[Path], part: str | None = None) -> Case:
    """A volume out of its one file, or of its slices in the order of their numbers. Raises DataError."""
    if all(path.stem == name for path in files):
        return Case(subject_of(name), name, tuple(files), part)
    if any(path.stem == name for path in files):
        raise DataError(f"{files[0].parent / name}: a list names it and slices of it")
    ordered = sorted(files, key=lambda path: place(path.stem))
    numbers = tuple(place(path.stem)[1] for path in ordered)
    for before, path in pairwise(ordered):
        if place(before.stem) == place(path.stem):
            raise DataError(f"{path}: is slice {place(path.stem)[1]} of {name}, and so is {before.name}")
    return Case(subject_of(name), name, tuple(ordered), part, numbers)


def read_h5(case: Case, spacing: float | None, of_rows: bool = True) -> Volume:
    """One case, its image normalised over the volume. The files state no mm: a pixel counts as 1. Raises DataError.

    of_rows: arrays are [Z, rows from the top, columns], else [X, Y, Z].
    """
    pairs = [read_file(path, of_rows) for path in case.files]
    for path, (image, _) in zip(case.files, pairs, strict=True):
        if case.numbers is not None and image.shape[3] > 1:
            raise DataError(f"{path}: is named as one slice and holds {image.shape[3]}")
    sizes = [f"{image.shape[2]} x {image.shape[1]}" for image, _ in pairs]
    for path, size in zip(case.files, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(f"{path}: is {size}, {case.files[0].name} of the same volume {sizes[0]}")
    image, label = (torch.cat(parts, 3) for parts in zip(*pairs, strict=True))
    return rescaled(NormalizeIntensity(channel_wise=True)(image), label, spacing)


def read_file(path: Path, of_rows: bool = True) -> tuple[Tensor, Tensor]:
    """Image and label [1, X, Y, Z] of one file; of_rows as in `read_h5`."""
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
    if not of_rows:
        return (image[None], label[None]) if image.ndim == 3 else (image[None, ..., None], label[None, ..., None])
    image, label = (from_rows(array.view(-1, *array.shape[-2:])).permute(1, 2, 0)[None] for array in (image, label))
    return image, label
