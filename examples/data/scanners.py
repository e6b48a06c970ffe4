"""Virtual subjects seen by a continuum of scanners: the comparison's built-in data, out of the MNI152 maps.

Few labels come from one scanner, the unlabelled slices from all of them; tissue contrast flips on the way (T1-like at
r = 0, FLAIR-like at r = 1). The classes need place, not only intensity: deep grey matter looks like cortex, the
brainstem like white matter. **The label map is geometric** (tissue maps cut at MNI coordinates in mm), not drawn by an
expert, and all subjects are one average brain under warps: a demonstration, not a benchmark. A subject is a function of
(generator seed, number), so the parts never share one.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from examples.data.slices import PARTS, Slices
from examples.data.splits import Split, draw_split
from examples.data.virtual_subjects import MM, load_maps, smooth_field
from examples.files import write_atomically

CLASSES = ("background", "cortex", "white matter", "deep grey + ventricles", "cerebellum + brainstem")
GENERATOR_SEEDS = {"train": 5101, "val": 5202, "test": 5303}
ORIGIN = np.array([-98.0, -134.0, -72.0])  # MNI coordinates of the template's first voxel
SIZE, PIXEL, STEP = (64, 80), 2.5, 8  # mm between pixels and between planes
TRAIN_PLANES = range(24, 113, STEP)  # mm from the lowest plane of the template
HELD_OUT_PLANES = range(28, 117, STEP)  # 4 mm off them
SCANNERS = {  # r of every subject: 8 + 24 for training, 3 at each of four scanners for validation and for test
    "train": [0.0] * 8 + [number / 24 for number in range(1, 25)],
    "val": [0.0, 1 / 3, 2 / 3, 1.0] * 3,
    "test": [0.0, 1 / 3, 2 / 3, 1.0] * 3,
}
CONTRAST = np.array([[0.25, 0.60, 0.90], [0.15, 0.95, 0.60]])  # CSF, grey, white at r = 0 and at r = 1
VENTRICLES, REACH = np.array([0.0, -8.0, 12.0]), 22.0  # MNI mm: where the pull is strongest, its standard deviation
RECIPE = (
    "affine .12, shift 4 mm, elastic B-spline sd 8 mm at 25 mm, ventricle pull U(0, .4) over 22 mm; "
    "contrast (.25, .60, .90) to (.15, .95, .60), jitter .03, bias U(.15, .3), Rician U(.03, .06)"
)


def classes_of(tissue: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """Class ids uint8 of tissue ids [...] (0 none, 1 CSF, 2 grey, 3 white) at MNI coordinates mm [3, ...]."""
    x, y, z = np.abs(mm[0]), mm[1], mm[2]
    cerebellum = (y < -38) & (z < -4 - 0.3 * x + 0.35 * (y + 48))
    brainstem = (x < 17) & (y >= -38) & (y < -12) & (z < -8)
    deep = (x < 36) & (y > -34) & (y < 24) & (z > -8) & (z < 22) & (x > 2)
    labels = np.array([0, 0, 1, 2], np.uint8)[tissue]  # CSF in the sulci is background
    labels[deep & ((tissue == 1) | (tissue == 2))] = 3
    labels[(cerebellum | brainstem) & (tissue >= 2)] = 4
    return labels


def make_subject(maps: np.ndarray, seed: int, number: int, planes: range, r: float) -> tuple[np.ndarray, np.ndarray]:
    """The planes (mm) of a subject on scanner r: images [P, 64, 80] float32, z-normalised per slice, labels uint8."""
    rng = np.random.default_rng([seed, number])
    shape = np.array(maps.shape[1:])
    middle = (shape - 1) * MM / 2
    axes = [middle[i] + PIXEL * (np.arange(SIZE[i]) - (SIZE[i] - 1) / 2) for i in (0, 1)]
    points = np.stack(np.meshgrid(*axes, np.array(planes, float), indexing="ij")) / MM  # in voxels of the template
    centre = (middle / MM).reshape(3, 1, 1, 1)
    affine = np.eye(3) + rng.uniform(-0.12, 0.12, (3, 3))
    source = np.einsum("ij,j...->i...", affine, points - centre) + centre
    source += rng.uniform(-4, 4, (3, 1, 1, 1)) / MM
    source += np.stack([smooth_field(rng, shape, points, 25 / MM) for _ in range(3)]) * 8 / MM
    away = source * MM + ORIGIN.reshape(3, 1, 1, 1) - VENTRICLES.reshape(3, 1, 1, 1)
    # Towards the ventricles' middle: what lies there is seen larger.
    source -= rng.uniform(0, 0.4) * np.exp(-(away**2).sum(0) / (2 * REACH**2)) * away / MM
    tissues = np.stack([map_coordinates(m, source, order=1) for m in maps[1:]])
    tissue = np.concatenate([1 - tissues.sum(0, keepdims=True), tissues]).argmax(0)
    labels = classes_of(tissue, source * MM + ORIGIN.reshape(3, 1, 1, 1))
    contrast = (1 - r) * CONTRAST[0] + r * CONTRAST[1] + rng.normal(0, 0.03, 3)
    image = np.tensordot(contrast, tissues, 1)
    image = image * np.exp(rng.uniform(0.15, 0.3) * smooth_field(rng, shape, points, 60 / MM))
    noise = rng.uniform(0.03, 0.06)
    image = np.hypot(image + rng.normal(0, noise, image.shape), rng.normal(0, noise, image.shape))
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    return np.moveaxis(image, 2, 0).astype(np.float32), np.moveaxis(labels, 2, 0)


def scanners(cache: Path | None = None) -> Slices:
    """All subjects; generated in a few seconds, or read from the file `cache` that an earlier call wrote.

    `source["r"]` gives each subject's scanner; held-out slices have its name as their zone.
    """
    planes = {"train": TRAIN_PLANES, "val": HELD_OUT_PLANES, "test": HELD_OUT_PLANES}
    key = f"{RECIPE}; seeds {GENERATOR_SEEDS}; scanners {SCANNERS}; {SIZE} at {PIXEL} mm; planes {planes}"
    arrays = None
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                arrays = stored["images"], stored["labels"]
    names = [(part, number, r) for part in PARTS for number, r in enumerate(SCANNERS[part])]
    if arrays is None:
        maps = load_maps()
        made = [make_subject(maps, GENERATOR_SEEDS[part], number, planes[part], r) for part, number, r in names]
        arrays = np.concatenate([m[0] for m in made]), np.concatenate([m[1] for m in made])
        if cache is not None:
            write_atomically(cache, lambda f: np.savez(f, images=arrays[0], labels=arrays[1], key=key))
    rows = [(part, f"{part}-{number:02d}", r, mm) for part, number, r in names for mm in planes[part]]
    return Slices(
        images=torch.from_numpy(arrays[0]).unsqueeze(1),
        labels=torch.from_numpy(arrays[1]),
        subjects=[name for _, name, _, _ in rows],
        ids=[f"{name}/z{mm:03d}" for _, name, _, mm in rows],
        planes=torch.tensor([mm for *_, mm in rows]),
        zones=["" if part == "train" else f"r={r:.2f}" for part, _, r, _ in rows],
        parts={name: part for part, name, _, _ in rows},
        classes=CLASSES,
        source={
            "layout": "scanners: virtual subjects of the MNI152 template",
            "recipe": RECIPE,
            "generator_seeds": GENERATOR_SEEDS,
            "r": {name: round(r, 4) for _, name, r, _ in rows},
            "spacing_mm": {name: [PIXEL, PIXEL, float(STEP)] for _, name, _, _ in rows},
        },
    )


def draw_scanner_split(slices: Slices, subjects: int, per_subject: int | None, seed: int) -> Split:
    """`subjects` labelled subjects, all on the first scanner, `per_subject` slices of each (None: all of them)."""
    first = {name for name, r in slices.source["r"].items() if r == 0}
    return draw_split(slices, subjects, per_subject, seed, among=first)
