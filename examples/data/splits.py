"""Which slices are labelled, unlabelled, for validation and for test: drawn once per seed, the same for every arm."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from examples.data.slices import PARTS, DataError, Slices
from examples.files import read_json


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
        raise DataError(
            f"at least 3 labelled subjects are needed for training, validation and test, got {subjects} "
            "(--subject PATTERN says which part of a name is one)"
        )
    order = np.random.default_rng(seed).permutation(subjects).tolist()
    tests, vals = max(1, len(order) // 5), max(1, len(order) // 10)
    return {name: "test" if i < tests else "val" if i < tests + vals else "train" for i, name in enumerate(order)}


def draw_split(
    slices: Slices, labelled: int, per_subject: int | None, seed: int, among: set[str] | None = None
) -> Split:
    """Draws `labelled` training subjects (of `among`) and `per_subject` labelled slices of each (None: all of them).

    The slices with foreground are divided into as many bands of planes as there are labelled subjects and each subject
    gives slices of another band, so that few labels still cover the whole body. Raises DataError when labels are short.
    """
    rng = np.random.default_rng(seed)
    train = slices.of_part("train")
    foreground = slices.has_foreground()
    candidates = [i for i in train if foreground[i] and (among is None or slices.subjects[i] in among)]
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


def first_split(slices: Slices, count: int) -> Split:
    """The first `count` training subjects, in the order of the folder's list, are labelled; the same for every seed.

    Benchmarks of semi-supervised segmentation choose in this way. Raises DataError where there are fewer subjects.
    """
    train = slices.of_part("train")
    names = list(dict.fromkeys(slices.subjects[i] for i in train))
    if not 1 <= count <= len(names):
        raise DataError(f"--labelled-first {count}: must be 1 to {len(names)}, the training subjects")
    labelled = [i for i in train if slices.subjects[i] in names[:count]]
    return Split(labelled, train, slices.of_part("val"), slices.of_part("test"))


def draw_slices(slices: Slices, count: int, seed: int) -> Split:
    """Draws `count` labelled slices with foreground, over as many training subjects as there are, one after the other.

    As in draw_split each subject begins with another band of planes. Raises DataError when slices are short.
    """
    rng = np.random.default_rng(seed)
    train = slices.of_part("train")
    foreground = slices.has_foreground()
    candidates = [i for i in train if foreground[i]]
    if not 1 <= count <= len(candidates):
        raise DataError(f"--labelled-slices {count}: must be 1 to {len(candidates)}, the training slices with labels")
    subjects = sorted({slices.subjects[i] for i in candidates})
    chosen = rng.permutation(subjects)[:count].tolist()
    planes = np.unique(slices.planes[candidates].numpy())
    bands = np.array_split(planes, len(chosen)) if len(chosen) <= len(planes) else [planes] * len(chosen)
    queues = []
    for subject, band in zip(chosen, rng.permutation(len(chosen)), strict=True):
        mine = rng.permutation([i for i in candidates if slices.subjects[i] == subject]).tolist()
        queues.append(sorted(mine, key=lambda i, band=band: int(slices.planes[i]) not in bands[band]))
    picked = [i for round_ in zip_longest(*queues) for i in round_ if i is not None][:count]
    return Split(sorted(picked), train, slices.of_part("val"), slices.of_part("test"))


def apply_split_file(slices: Slices, path: Path) -> tuple[Slices, list[int] | None]:
    """What a split file names, each subject in its part, and the positions of its labelled slices (None: not given).

    The file is JSON, {"train": [...], "val": [...], "test": [...], "labelled": [...]}, the form of a run's split.json;
    an entry is an id, or a case or subject and stands for all of its slices. Raises DataError, naming file and entry.
    """
    content = read_json(path)
    lists = {part: content.get(part) for part in (*PARTS, "labelled")} if isinstance(content, dict) else {}
    if "labelled" in lists and lists["labelled"] is None:
        del lists["labelled"]
    texts = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists.values())
    if not lists or not texts:
        raise DataError(f'{path}: is not of the form {{"train": ["..."], "val": ["..."], "test": ["..."]}}')
    found: dict[str, list[int]] = {}
    index: dict[str, list[int]] = {}
    for i, (name, subject) in enumerate(zip(slices.ids, slices.subjects, strict=True)):
        for key in {name, name.split("/")[0], subject}:
            index.setdefault(key, []).append(i)
    for part, names in lists.items():
        unknown = [name for name in names if name not in index]
        if unknown or not names:
            wrong = f"{unknown[0]!r} is no id, case or subject of the data" if unknown else "is empty"
            raise DataError(f"{path}: {part}: {wrong}")
        found[part] = sorted({i for name in names for i in index[name]})
    parts: dict[str, str] = {}
    for part in PARTS:
        for i in found[part]:
            if parts.setdefault(slices.subjects[i], part) != part:
                raise DataError(f"{path}: subject {slices.subjects[i]} is in {parts[slices.subjects[i]]} and in {part}")
    for i in sorted(set(found.get("labelled", [])) - set(found["train"])):
        raise DataError(f"{path}: labelled: {slices.ids[i]} is not among the training {slices.noun}")
    kept = sorted(i for part in PARTS for i in found[part])
    labelled = [kept.index(i) for i in found["labelled"]] if "labelled" in found else None
    return slices.select(kept, parts), labelled
