"""results.json: what was run, on which slices, and what came out, over every seed found in the out folder."""

import argparse
import dataclasses
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from examples.arms import PARTS, PROBES, SEGMENTERS
from examples.data.slices import Slices
from examples.files import read_json
from examples.settings import Settings
from examples.training import DONE

FORMAT = 1
PACKAGES = ("torch", "monai", "lightning", "nibabel", "nilearn", "h5py", "numpy")
BASELINES = ("supervised_iterations", "supervised_seconds")
TITLES = {
    "ours": "three stages",
    "supervised_iterations": "supervised, equal iterations",
    "supervised_seconds": "supervised, equal seconds",
    "probe_random": "linear head, random body",
    "probe_stage2": "linear head, body of stage 2",
    "probe_shuffled": "linear head, stage 2 on shuffled labels",
}
# Dice points that stage 2 of the demonstration must gain over a random body and owe to its labels.
PROBE_GAIN, SHUFFLED_LOSS = 20.0, 10.0


def collect(options: argparse.Namespace, settings: Settings, slices: Slices) -> dict:
    """Gathers everything that the seeds' folders hold."""
    runs = [read_run(folder) for folder in seed_folders(options.out)]
    parts = {part: [slices.ids[i] for i in slices.of_part(part)] for part in ("train", "val", "test")}
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings)
        | {"labelled": options.labelled, "labelled_slices": options.labelled_slices},
        "data": {**slices.source, "classes": list(slices.classes), "size": list(slices.size), "noun": slices.noun},
        "versions": versions(),
        "splits": parts,
        "runs": runs,
        "summary": {name: summary for part, name in PARTS.items() if (summary := summarise(runs, part))},
        "checks": [check for run in runs if (check := check_probes(run, is_demonstration(slices)))],
    }


def seed_folders(out: Path) -> list[Path]:
    """The folders of all seeds run so far, by seed."""
    found = (path.parent for path in out.glob("seed*/split.json") if path.parent.name.removeprefix("seed").isdecimal())
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("seed")))


def read_run(folder: Path) -> dict:
    """One seed: labelled ids and arms. `iterations` and `seconds` of "ours" are those of its three stages together."""
    arms = {}
    stages = {f"stage{n}": read_json(p) for n in (1, 2, 3) if (p := folder / f"stage{n}" / DONE).is_file()}
    if stages:
        before = [stages[name] for name in ("stage1", "stage2") if name in stages]
        offset = {key: sum(stage[key] for stage in before) for key in ("iterations", "seconds")}
        arms["ours"] = {
            "iterations": sum(stage["iterations"] for stage in stages.values()),
            "seconds": round(sum(stage["seconds"] for stage in stages.values()), 2),
            "stages": {name: {key: stage[key] for key in offset} for name, stage in stages.items()},
            "curve": [
                {
                    "iteration": p["iteration"] + offset["iterations"],
                    "seconds": round(p["seconds"] + offset["seconds"], 2),
                }
                | {"dice": p["dice"]}
                for p in stages.get("stage3", {"curve": []})["curve"]
            ],
        }
    for name in BASELINES:
        if (folder / name / DONE).is_file():
            arms[name] = read_json(folder / name / DONE)
    for name in (*SEGMENTERS, *PROBES):
        dice = {PARTS[part]: read_json(p) for part in PARTS if (p := folder / name / f"dice_{part}.json").is_file()}
        if dice:
            arms.setdefault("ours" if name == "stage3" else name, {})["dice"] = dice
    labelled = read_json(folder / "split.json")["labelled"]
    return {"seed": int(folder.name.removeprefix("seed")), "labelled": labelled, "arms": arms}


def titles_of(runs: list[dict]) -> dict[str, str]:
    """What tables and figures call the arms; that of equal seconds with the seconds it took, as a multiple of ours."""
    pairs = [(run["arms"].get("supervised_seconds", {}), run["arms"].get("ours", {})) for run in runs]
    found = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs if theirs.get("seconds") and ours]
    if not found:
        return TITLES
    ends = dict.fromkeys(f"{end:.2f}" for end in (min(found), max(found)))
    return TITLES | {"supervised_seconds": f"{TITLES['supervised_seconds']} ({' to '.join(ends)} x)"}


def summarise(runs: list[dict], part: str) -> dict:
    """Over the seeds: each arm's Dice and the paired differences between ours and each baseline, seed by seed."""

    def values(arm: str, zone: str, name: str) -> dict[int, float]:
        tables = {run["seed"]: run["arms"].get(arm, {}).get("dice", {}).get(PARTS[part], {}) for run in runs}
        found = {seed: table.get(zone, {}).get(name) for seed, table in tables.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    tables = [d for run in runs for arm in run["arms"].values() if (d := arm.get("dice", {}).get(PARTS[part]))]
    if not tables:
        return {}
    columns = [("all", name) for name in tables[0]["all"]] + [(zone, "mean") for zone in tables[0] if zone != "all"]
    dice = {
        arm: {label(*column): spread(list(found.values())) for column in columns if (found := values(arm, *column))}
        for arm in TITLES
    }
    differences = {}
    for baseline in BASELINES:
        pairs = {}
        for column in columns:
            ours, theirs = values("ours", *column), values(baseline, *column)
            if both := sorted(ours.keys() & theirs.keys()):
                pairs[label(*column)] = spread([ours[seed] - theirs[seed] for seed in both])
        if pairs:
            differences[baseline] = pairs
    rows = {arm: row for arm, row in dice.items() if row}
    return {"dice": rows, "ours_minus": differences} if rows else {}  # none where no case of the part holds a class


def label(zone: str, name: str) -> str:
    """A column's name: the class, "mean", or "mean, zone"."""
    return name if zone == "all" else f"{name}, {zone}"


def spread(values: list[float]) -> dict:
    """Mean, standard deviation (None for one value) and the values themselves."""
    sd = round(statistics.stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 3), "sd": sd, "values": [round(value, 3) for value in values]}


def is_demonstration(slices: Slices) -> bool:
    """Whether these are the built-in slices, for which PROBE_GAIN and SHUFFLED_LOSS were set."""
    return slices.source["layout"].startswith("virtual") and slices.noun == "slices"


def check_probes(run: dict, demonstration: bool) -> dict:
    """What stage 2 taught the frozen body, and how much of it came from the labels (validation Dice); of the
    demonstration also whether that is what is asked for."""
    try:
        random, stage2, shuffled = (run["arms"][name]["dice"]["validation"]["all"]["mean"] for name in PROBES)
    except KeyError:
        return {}
    if None in (random, stage2, shuffled):  # no validation case holds a class
        return {}
    gain, loss = round(stage2 - random, 3), round(stage2 - shuffled, 3)
    found = {"seed": run["seed"], "probe_gain": gain, "shuffled_loss": loss}
    return found | ({"passed": gain >= PROBE_GAIN and loss >= SHUFFLED_LOSS} if demonstration else {})


def versions() -> dict[str, str]:
    """The versions of Python and of the packages in use; hpcloss may be used from a checkout without installation."""
    import hpcloss

    found = {"python": platform.python_version(), "hpcloss": str(getattr(hpcloss, "__version__", "unknown"))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
