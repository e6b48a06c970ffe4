"""Pictures with masks, as ultrasound and nuclei come: PNG files, grey or RGB, whose mask values are class ids.

FOLDER/images/NAME.png with FOLDER/masks/NAME.png or NAME_mask.png; or both in FOLDER, NAME.png and NAME_mask.png.
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
    read_lists,
    rescaled,
    subject_of,
)
from examples.data.slices import DataError

GREY = ("1", "L", "I", "F", "I;16")  # Pillow's modes of one channel; palettes of images and the rest become RGB


def find_pictures(folder: Path) -> Layout | None:
    """All pictures and their masks, or those that the lists name."""
    home = folder / "images" if (folder / "images").is_dir() else folder
    images = {path.stem: path for path in sorted(home.glob("*.png")) if not path.stem.endswith("_mask")}
    if not images:
        return None
    lists = read_lists(folder)
    parts: list[tuple[str, str | None]] = [(name, part) for part, names in lists.items() for name in names]
    if "train" not in lists:
        parts += [(name, None) for name in images if name not in dict(parts)]
    cases = []
    for name, part in parts:
        image = images.get(name, home / f"{name}.png")
        masks = (folder / "masks" / image.name, folder / "masks" / f"{name}_mask.png", home / f"{name}_mask.png")
        mask = next((path for path in masks if path.is_file()), None)
        if mask is None:
            raise DataError(f"{image}: has no mask {masks[0]}, {masks[1].name} there or beside the image")
        cases.append(Case(subject_of(name), name, (image, mask), part))
    largest = (0, 0)
    for case in cases:
        with opened(case.files[0]) as picture:
            largest = (max(largest[0], picture.width), max(largest[1], picture.height))
    return Layout("PNG images and masks", cases, read_picture, largest=largest, rgb=True)


def read_picture(case: Case, spacing: float | None) -> Volume:
    """One picture as a volume of one slice, normalised per channel. A pixel counts as 1 mm. Raises DataError."""
    image_file, mask_file = case.files
    image, label = pixels(image_file, GREY), pixels(mask_file, (*GREY, "P"))
    if (label != label[:1]).any():
        raise DataError(f"{mask_file}: is coloured; a mask has one value for each class")
    check_pair(image_file, mask_file, image, label[:1], None)
    return rescaled(NormalizeIntensity(channel_wise=True)(image), label[:1], spacing)


def opened(path: Path) -> Image.Image:
    """A picture whose header has been read."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


def pixels(path: Path, kept: tuple[str, ...]) -> Tensor:
    """A picture as [C, X, Y, 1] float32; one whose mode is not `kept` becomes RGB."""
    with opened(path) as picture:
        try:
            rows = np.array(picture if picture.mode in kept else picture.convert("RGB"), np.float32)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's for a file that ends early or is broken
            raise DataError(f"{path}: cannot be read as a picture ({first_line(error)})") from error
    return from_rows(torch.from_numpy(rows.reshape(*rows.shape[:2], -1)).permute(2, 0, 1))[..., None]
