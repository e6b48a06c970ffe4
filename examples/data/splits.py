"""Which slices are labelled, unlabelled, for validation and for test: drawn once per seed, the same for every arm."""

from dataclasses import dataclass

import numpy as np

from examples.data.slices import PARTS, DataError, Slices


@dataclass(frozen=True)
class Split:
    """Slice positions. `train` holds every training slice, used without labels; `labelled` is a subset of it."""

    labelled: list[int]
    train: list[int]
    val: list[int]
    test: list[int]

    def ids(self, slices: Slices) -> dict[str, list[str]]:
        """The same split by slice ids, for the results file."""
        return {name: [slices.ids[i] for i in getattr(self, name)] for name in ("labelled", *PARTS)}


def assign_parts(subjects: list[str], seed: int = 0) -> dict[str, str]:
    """Gives about 20 % of the subjects to test and 10 % to validation, at least one each, the rest to training."""
    subjects = sorted(set(subjects))
    if len(subjects) < 3:
        raise DataError(f"at least 3 labelled subjects are needed for training, validation and test, got {subjects}")
    order = np.random.default_rng(seed).permutation(subjects).tolist()
    tests, vals = max(1, len(order) // 5), max(1, len(order) // 10)
    return {name: "test" if i < tests else "val" if i < tests + vals else "train" for i, name in enumerate(order)}


def draw_split(slices: Slices, labelled: int, per_subject: int | None, seed: int) -> Split:
    """Draws `labelled` training subjects and `per_subject` labelled slices of each (None: all of them).

    The slices with foreground are divided into as many bands of planes as there are labelled subjects and each subject
    gives slices of another band, so that few labels still cover the whole body. Raises DataError when labels are short.
    """
    rng = np.random.default_rng(seed)
    train = slices.of_part("train")
    foreground = slices.has_foreground()
    candidates = [i for i in train if foreground[i]]
    subjects = sorted({slices.subjects[i] for i in candidates})
    if labelled < 1 or not subjects:
        raise DataError("no labelled case: --labelled must be at least 1 and a training case must hold foreground")
    if labelled > len(subjects):
        raise DataError(f"--labelled {labelled} is more than the {len(subjects)} training subjects with labels")
    chosen = rng.choice(subjects, labelled, replace=False).tolist()
    planes = np.unique(slices.planes[candidates].numpy())
    bands = np.array_split(planes, labelled) if labelled <= len(planes) else [planes] * labelled
    picked: list[int] = []
    for subject, band in zip(chosen, rng.permutation(labelled), strict=True):
        mine = [i for i in train if slices.subjects[i] == subject]
        if per_subject is not None:
            in_band = [i for i in mine if foreground[i] and int(slices.planes[i]) in bands[band]]
            usable = in_band or [i for i in mine if foreground[i]]
            mine = rng.choice(usable, min(per_subject, len(usable)), replace=False).tolist()
        picked += mine
    return Split(sorted(picked), train, slices.of_part("val"), slices.of_part("test"))
