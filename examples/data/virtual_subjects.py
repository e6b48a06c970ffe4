"""Virtual subjects out of the MNI152 average brain that nilearn ships: real MRI contrast, no download.

One average brain, warped and recoloured: a demonstration, not a benchmark. Each subject is the T1 template and its
grey- and white-matter maps under a random affine map and an elastic field, with a random tissue contrast, gamma,
bias field and Rician noise. Labels: 0 background, 1 CSF, 2 grey matter, 3 white matter. A subject is a function of
(generator seed, number), so the parts below never share one.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from examples.data.slices import PARTS, Slices
from examples.data.volumes import Volumes, pad
from examples.files import write_atomically

CLASSES = ("background", "CSF", "grey matter", "white matter")
GENERATOR_SEEDS = {"train": 4101, "val": 4202, "test": 4303}
SUBJECTS = {"train": 20, "val": 4, "test": 8}
MM = 2  # voxel size in plane and of the template's grid
SIZE = (96, 112)
TRAIN_PLANES = range(44, 133, 8)  # mm from the lowest plane of the template
NEAR_PLANES = range(88, 129, 8)  # 4 mm off the training planes
FAR_PLANES = range(40, 73, 8)  # the lower half of the brain, where fewer pixels are brain
VOLUMES = {"train": 6, "val": 1, "test": 2}  # subjects as whole volumes of 4 mm voxels, for trying out 3-D
VOLUME_PLANES = range(-8, 184, 2 * MM)
RECIPE = "affine .12, shift 4 mm, elastic B-spline sd 8 mm at 25 mm, tissue .15, gamma 2^1, bias .3, Rician .08"


def load_maps() -> np.ndarray:
    """[T1, CSF, grey, white] on the template's 2 mm grid: T1 divided by its 99.5th percentile, maps in [0, 1]."""
    from nilearn import datasets

    t1, grey, white, brain = (
        load(resolution=MM).get_fdata(dtype=np.float32)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    )
    csf = np.clip(brain - grey - white, 0, 1)
    return np.stack([t1 / np.percentile(t1, 99.5), csf, grey, white])


def smooth_field(rng: np.random.Generator, shape: np.ndarray, points: np.ndarray, spacing: float) -> np.ndarray:
    """A cubic B-spline with standard normal control points every `spacing` voxels, read at points [3, ...]."""
    control = rng.standard_normal(tuple(np.ceil(shape / spacing).astype(int) + 3))
    return map_coordinates(control, points / spacing + 1, order=3, mode="nearest", prefilter=False)


def draw_subject(
    maps: np.ndarray, seed: int, number: int, planes: range, step: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The planes (mm) of subject `number`, every step-th pixel: image [X, Y, P] as drawn, and labels uint8."""
    rng = np.random.default_rng([seed, number])
    shape = np.array(maps.shape[1:])
    corner = (shape[:2] - SIZE) // 2
    axes = [corner[i] + np.arange(0, SIZE[i], step) for i in (0, 1)] + [np.array(planes) / MM]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    centre = (shape / 2).reshape(3, 1, 1, 1)
    affine = np.eye(3) + rng.uniform(-0.12, 0.12, (3, 3))
    source = np.einsum("ij,j...->i...", affine, points - centre) + centre
    source += rng.uniform(-4, 4, (3, 1, 1, 1)) / MM
    source += np.stack([smooth_field(rng, shape, points, 25 / MM) for _ in range(3)]) * 8 / MM
    t1, *tissues = (map_coordinates(m, source, order=1) for m in maps)
    # The maps are warped, then compared: cleaner borders than warping labels by nearest neighbour.
    labels = np.stack([1 - sum(tissues), *tissues]).argmax(0).astype(np.uint8)
    image = t1 + sum(map_ * shift for map_, shift in zip(tissues, rng.uniform(-0.15, 0.15, 3), strict=True))
    image = np.clip(image, 0, None) ** 2 ** rng.uniform(-1, 1)
    image = image * np.exp(0.3 * smooth_field(rng, shape, points, 60 / MM))
    image = np.hypot(image + rng.normal(0, 0.08, image.shape), rng.normal(0, 0.08, image.shape))
    return image, labels


def make_subject(maps: np.ndarray, seed: int, number: int, planes: range) -> tuple[np.ndarray, np.ndarray]:
    """The planes (mm) of subject `number`: images [P, 96, 112] float32, z-normalised per slice, and labels uint8."""
    image, labels = draw_subject(maps, seed, number, planes)
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    return np.moveaxis(image, 2, 0).astype(np.float32), np.moveaxis(labels, 2, 0)


def virtual_subjects(cache: Path | None = None) -> Slices:
    """All virtual subjects; generated in a few seconds, or read from the file `cache` that an earlier call wrote."""
    held_out = sorted([*NEAR_PLANES, *FAR_PLANES])
    planes = {"train": TRAIN_PLANES, "val": held_out, "test": held_out}
    key = f"{RECIPE}; seeds {GENERATOR_SEEDS}; subjects {SUBJECTS}; planes { {k: list(v) for k, v in planes.items()} }"
    arrays = None
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                arrays = stored["images"], stored["labels"]
    names = [(part, number) for part in PARTS for number in range(SUBJECTS[part])]
    if arrays is None:
        maps = load_maps()
        made = [make_subject(maps, GENERATOR_SEEDS[part], number, planes[part]) for part, number in names]
        arrays = np.concatenate([m[0] for m in made]), np.concatenate([m[1] for m in made])
        if cache is not None:
            write_atomically(cache, lambda f: np.savez(f, images=arrays[0], labels=arrays[1], key=key))
    rows = [(part, f"{part}-{number:02d}", mm) for part, number in names for mm in planes[part]]
    return Slices(
        images=torch.from_numpy(arrays[0]).unsqueeze(1),
        labels=torch.from_numpy(arrays[1]),
        subjects=[name for _, name, _ in rows],
        ids=[f"{name}/z{mm:03d}" for _, name, mm in rows],
        planes=torch.tensor([mm for *_, mm in rows]),
        zones=["" if part == "train" else "near" if mm in NEAR_PLANES else "far" for part, _, mm in rows],
        parts={name: part for part, name, _ in rows},
        classes=CLASSES,
        source={
            "layout": "virtual subjects of the MNI152 template",
            "recipe": RECIPE,
            "generator_seeds": GENERATOR_SEEDS,
        },
    )


def virtual_volumes(patch: tuple[int, int, int]) -> Volumes:
    """A few virtual subjects as whole volumes [1, 48, 56, 48] of 4 mm voxels, each normalised over the volume."""
    maps = load_maps()
    names = [(part, number) for part in PARTS for number in range(VOLUMES[part])]
    made = [draw_subject(maps, GENERATOR_SEEDS[part], number, VOLUME_PLANES, step=2) for part, number in names]
    images = [torch.from_numpy(((image - image.mean()) / image.std()).astype(np.float32))[None] for image, _ in made]
    subjects = [f"{part}-{number:02d}" for part, number in names]
    return Volumes(
        images=[pad(image, patch, float(image.min())) for image in images],
        labels=[pad(torch.from_numpy(labels)[None], patch, 0)[0] for _, labels in made],
        subjects=subjects,
        ids=subjects,
        planes=torch.arange(len(names)),
        zones=[""] * len(names),
        parts={name: part for name, (part, _) in zip(subjects, names, strict=True)},
        classes=CLASSES,
        source={
            "layout": "virtual subjects of the MNI152 template, as volumes of 4 mm voxels",
            "recipe": RECIPE,
            "generator_seeds": GENERATOR_SEEDS,
        },
        patch=patch,
    )
