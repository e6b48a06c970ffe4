"""Paired differences between arms over seeds, with bootstrap intervals."""

import numpy as np

RESAMPLES = 10_000
BASELINES = ("mean-teacher", "fixmatch", "unimatch", "cross-pseudo", "copy-paste")  # semi-supervised, without contrast


def bootstrap_interval(differences: list[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of paired differences; None for fewer than two of them."""
    if len(differences) < 2:
        return None
    values = np.asarray(differences, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> dict | None:
    """Mean difference over the seeds both have, its interval, and whether the interval lies above or below 0."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    values = [ours[seed] - theirs[seed] for seed in seeds]
    interval = bootstrap_interval(values)
    return {
        "mean": round(float(np.mean(values)), 3),
        "interval": None if interval is None else [round(end, 3) for end in interval],
        "sign": 0 if interval is None else int(interval[0] > 0) - int(interval[1] < 0),
        "seeds": seeds,
        "values": [round(value, 3) for value in values],
    }


def scores_by_seed(runs: list[dict], arm: str, part: str, measure: str, zone: str, name: str) -> dict[int, float]:
    """{seed: score} of an arm, where it has one."""
    tables = {run["seed"]: run["arms"].get(arm, {}).get(part, {}).get(measure, {}) for run in runs}
    found = {seed: table.get(zone, {}).get(name) for seed, table in tables.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def best_baseline(runs: list[dict]) -> str | None:
    """The semi-supervised baseline with the highest mean Dice on validation, of those that every seed has."""
    means = {}
    for arm in BASELINES:
        dice = scores_by_seed(runs, arm, "validation", "dice", "all", "mean")
        if dice.keys() == {run["seed"] for run in runs}:
            means[arm] = float(np.mean(list(dice.values())))
    return max(means, key=lambda arm: means[arm], default=None)


def references(runs: list[dict]) -> list[str]:
    """What every arm is compared with: the best baseline, and supervised training."""
    best = best_baseline(runs)
    return ["supervised"] if best is None else [best, "supervised"]


def summarise(runs: list[dict], part: str) -> dict:
    """{measure: {arm: {column: {"mean", "values"} and, against each of `references`, the paired difference}}}.

    Columns are "mean", the classes, and "mean, ZONE" of every zone.
    """
    names = list(dict.fromkeys(arm for run in runs for arm in run["arms"]))
    summary: dict = {}
    tables = [entry[part] for run in runs for entry in run["arms"].values() if part in entry]
    for measure in tables[0] if tables else ():
        zones = tables[0][measure]
        columns = {"mean": ("all", "mean")} | {name: ("all", name) for name in zones["all"] if name != "mean"}
        columns |= {f"mean, {zone}": (zone, "mean") for zone in zones if zone != "all"}
        summary[measure] = {}
        for arm in names:
            row = {}
            for column, (zone, name) in columns.items():
                ours = scores_by_seed(runs, arm, part, measure, zone, name)
                if ours:
                    row[column] = {"mean": round(float(np.mean(list(ours.values()))), 3), "by_seed": ours}
                    for reference in references(runs):
                        theirs = scores_by_seed(runs, reference, part, measure, zone, name)
                        if arm != reference and (difference := paired_difference(ours, theirs)):
                            row[column][f"minus {reference}"] = difference
            if row:
                summary[measure][arm] = row
    return summary


def summarise_probes(runs: list[dict]) -> dict:
    """{body: {"mean", "by_seed" and, against random weights, the paired difference}} of the linear heads."""
    found = {}
    for body in runs[0]["probes"]:
        ours, random = ({run["seed"]: run["probes"][name] for run in runs} for name in (body, "random"))
        found[body] = {"mean": round(float(np.mean(list(ours.values()))), 3), "by_seed": ours}
        if body != "random":
            found[body]["minus random"] = paired_difference(ours, random)
    return found


def positive_control(runs: list[dict], asked: float) -> dict:
    """Does the best baseline beat supervised, and do all labels beat few by `asked` Dice?

    On test where it was read, as the best is chosen on validation: the best of several looks better than it is where
    it was chosen. Passed where both hold with intervals above 0. Without it no claim about a method can be made on the
    data.
    """
    found = {}
    for arm in (best_baseline(runs) or BASELINES[0], "all-labels"):
        part = "test" if all("test" in run["arms"].get(arm, {}) for run in runs) else "validation"
        dice = [scores_by_seed(runs, name, part, "dice", "all", "mean") for name in (arm, "supervised")]
        found[arm] = paired_difference(*dice)
    passed = all(entry is not None and entry["sign"] > 0 for entry in found.values())
    passed = passed and found["all-labels"]["mean"] >= asked
    return {f"{arm} minus supervised": entry for arm, entry in found.items()} | {"passed": passed}
