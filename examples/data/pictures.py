"""Pictures with masks, as ultrasound, photographs of skin and eyes, and nuclei come: grey or RGB.

FOLDER/images/NAME.png with FOLDER/masks/NAME.png or NAME_mask.png; or both in FOLDER, NAME.png and NAME_mask.png. The
files may be PNG, TIFF, JPEG, GIF or BMP, and a mask of another kind than its picture. Values of masks become classes in
ascending order: 0 and 255 are background and one class.
Nested, as DSB2018 is downloaded: FOLDER/NAME/images/NAME.png with FOLDER/NAME/masks/*.png, one mask for each instance
of one class.
FOLDER/train.list, val.list and test.list name the parts, where they exist.
"""

from pathlib import Path

import numpy as np
import torch
from monai.transforms import NormalizeIntensity
from PIL import Image
from torch import Tensor

from examples.data.layout import (
    Case,
    Layout,
    Volume,
    check_pair,
    first_line,
    from_rows,
    named_parts,
    rescaled,
    subject_of,
)
from examples.data.slices import DataError

GREY = ("1", "L", "I", "F", "I;16")  # Pillow's modes of one channel; palettes of images and the rest become RGB
KINDS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".gif", ".bmp")


def find_pictures(folder: Path) -> Layout | None:
    """All pictures and their masks, or those that the lists name."""
    home = folder / "images" if (folder / "images").is_dir() else folder
    here, masks = pictures_in(home), pictures_in(folder / "masks")
    images = {name: path for name, path in here.items() if not name.endswith("_mask")}
    if not images:
        return None
    cases = []
    for name, part in named_parts(folder, list(images)):
        image = images.get(name, home / f"{name}.png")
        mask = masks.get(name) or masks.get(f"{name}_mask") or here.get(f"{name}_mask")
        if mask is None:
            raise DataError(f"{image}: has no mask {folder / 'masks' / image.name}, {name}_mask there or beside it")
        cases.append(Case(subject_of(name), name, (image, mask), part))
    return Layout("images and masks", cases, read_picture, largest=largest_of(cases), rgb=True)


def find_nested(folder: Path) -> Layout | None:
    """All NAME/images/NAME.png with the instances in NAME/masks, or those that the lists name."""
    homes = [path.parent.name for path in sorted(folder.glob("*/images")) if path.is_dir()]
    if not any((folder / name / "masks").is_dir() for name in homes):
        return None
    cases = []
    for name, part in named_parts(folder, homes):
        images = list(pictures_in(folder / name / "images").values())
        if len(images) != 1:
            raise DataError(f"{folder / name / 'images'}: must hold one picture, got {len(images)}")
        masks = pictures_in(folder / name / "masks")
        if not masks:
            raise DataError(f"{folder / name / 'masks'}: holds no mask of an instance")
        cases.append(Case(subject_of(name), name, (*images, *masks.values()), part))
    classes = ("background", "foreground")
    return Layout("images and instances", cases, read_instances, classes, largest=largest_of(cases), rgb=True)


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without suffix. Raises DataError where two have one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in KINDS and found.setdefault(path.stem, path) != path:
            raise DataError(f"{path}: has the name of {found[path.stem].name}")
    return found


def largest_of(cases: list[Case]) -> tuple[int, int]:
    """The largest width and height of the cases' pictures."""
    largest = (0, 0)
    for case in cases:
        with opened(case.files[0]) as picture:
            largest = (max(largest[0], picture.width), max(largest[1], picture.height))
    return largest


def read_picture(case: Case, spacing: float | None) -> Volume:
    """One picture as a volume of one slice, normalised per channel. A pixel counts as 1 mm. Raises DataError."""
    image_file, mask_file = case.files
    image, label = pixels(image_file, GREY), mask_of(mask_file)
    check_pair(image_file, mask_file, image, label, None)
    return rescaled(NormalizeIntensity(channel_wise=True)(image), label, spacing)


def read_instances(case: Case, spacing: float | None) -> Volume:
    """One picture; its class is what any mask of an instance holds. Raises DataError."""
    image_file, *masks = case.files
    image = pixels(image_file, GREY)
    label = torch.zeros(1, *image.shape[1:])
    for path in masks:
        instance = mask_of(path)
        check_pair(image_file, path, image, instance, None)
        label[instance > 0] = 1
    return rescaled(NormalizeIntensity(channel_wise=True)(image), label, spacing)


def mask_of(path: Path) -> Tensor:
    """A mask as [1, X, Y, 1] float32. Only a PNG's palette numbers classes; other palettes are colours."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{path}: is a JPEG, which does not keep the values of a mask")
    label = pixels(path, (*GREY, "P") if path.suffix.lower() == ".png" else GREY)
    if (label != label[:1]).any():
        raise DataError(f"{path}: is coloured; a mask has one value for each class")
    return label[:1]


def opened(path: Path) -> Image.Image:
    """A picture whose header has been read."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


def pixels(path: Path, kept: tuple[str, ...]) -> Tensor:
    """A picture as [C, X, Y, 1] float32; one whose mode is not `kept` becomes RGB."""
    with opened(path) as picture:
        try:
            pages = getattr(picture, "n_frames", 1)
            rows = np.array(picture if picture.mode in kept else picture.convert("RGB"), np.float32)
        except (OSError, SyntaxError, TypeError, ValueError) as error:  # Pillow's for a file that is broken
            raise DataError(f"{path}: cannot be read as a picture ({first_line(error)})") from error
    if pages > 1:
        raise DataError(f"{path}: holds {pages} pictures, must hold one")
    return from_rows(torch.from_numpy(rows.reshape(*rows.shape[:2], -1)).permute(2, 0, 1))[..., None]
