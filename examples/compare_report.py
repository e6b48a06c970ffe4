"""The comparison's results.json, report.md and closing table."""

import argparse
import dataclasses
from pathlib import Path

from examples import compare_figures
from examples.data.slices import Slices
from examples.files import read_json, write_json, write_text
from examples.paired import RESAMPLES, positive_control, references, summarise, summarise_probes
from examples.recipes import Choice
from examples.report import aligned
from examples.results import versions
from examples.trials import Trial

# Dice points that all labels must gain over few. The built-in data were made to leave that much to gain; a folder is as
# it is, and any gain will do.
ASKED = 10.0
MEASURES = {"dice": "Dice, %", "hd95": "95 % Hausdorff distance, mm"}
BETTER = {"dice": 1, "hd95": -1}  # the sign of a difference that is a gain

Trials = dict[tuple[str, int], Trial]


def write_report(options: argparse.Namespace, slices: Slices, trials: Trials, choices: dict[str, Choice]) -> str:
    """Writes results.json, figures and report.md of these trials; returns the text for the terminal."""
    results = collect(options, slices, trials, choices)
    write_json(options.out / "results.json", results)
    drawn = compare_figures.draw(options.out / "figures", results, slices, trials)
    write_text(options.out / "report.md", markdown(results, drawn))
    lines = []
    for label, found in results["labels"].items():
        lines += ["", f"{label}: {control_line(found['positive_control'])}"]
        for part, summary in found["summary"].items():
            lines += [
                "",
                f"{label}, {part}, Dice %",
                *aligned(difference_rows(summary["dice"], "dice", references(found["runs"]))),
            ]
    lines += [f"report   {options.out / 'report.md'}", f"results  {options.out / 'results.json'}"]
    return "\n".join(lines)


def collect(options: argparse.Namespace, slices: Slices, trials: Trials, choices: dict[str, Choice]) -> dict:
    """Everything measured: per number of labels the runs, their summary and the positive control."""
    tests = read_json(options.out / "test.json") if (options.out / "test.json").is_file() else {}
    labels = {}
    for label in options.labels:
        runs = []
        for (name, seed), trial in trials.items():
            if name == label:
                test = tests.get(f"{label}/seed{seed}", {})
                scores = {arm: {"validation": trial.scores(arm, "val")} for arm in options.methods}
                scores = {arm: own | ({"test": test[arm]} if arm in test else {}) for arm, own in scores.items()}
                entries = {arm: trial.cost(arm) | own for arm, own in scores.items()}
                probes = {body: trial.probe(body) for body in trial.bodies(options.methods)}
                labelled = trial.split.ids(slices)["labelled"]
                runs.append({"seed": seed, "labelled": labelled, "arms": entries, "probes": probes})
        read = any("test" in entry for run in runs for entry in run["arms"].values())
        parts = ["validation", *(["test"] if read else [])]
        labels[label] = {
            "positive_control": positive_control(runs, asked_of(slices.source)),
            "summary": {part: summarise(runs, part) for part in parts},
            "probes": summarise_probes(runs),
            "runs": runs,
        }
    return {
        "format": 1,
        "data": {**slices.source, "classes": list(slices.classes), "size": list(slices.size)},
        "settings": dataclasses.asdict(options.settings),
        "iterations": dataclasses.asdict(options.iterations),
        "choices": choices,
        "versions": versions(),
        "labels": labels,
    }


def asked_of(data: dict) -> float:
    """What all labels must gain over few, in Dice."""
    return ASKED if data["layout"].startswith("scanners") else 0.0


def markdown(results: dict, drawn: list[Path]) -> str:
    """The report: the positive control first, then the tables, what each arm cost, and the figures."""
    lines = ["# Comparison", "", f"Data: {results['data']['layout']}.", "", "## Positive control", ""]
    asked = asked_of(results["data"])
    bar = f" by at least {asked:g} Dice" if asked else ""
    lines += [f"- {label}: {control_line(found['positive_control'])}" for label, found in results["labels"].items()]
    lines += [
        "",
        "It asks whether unlabelled images can help here at all: the semi-supervised baseline without contrast that is "
        f"best on validation must beat supervised training, and all labels must beat few{bar}, "
        "both with intervals above 0, on test where it was read.",
        "",
        f"Differences are paired over seeds, with the 95 % bootstrap interval of their mean ({RESAMPLES} resamples); "
        '"gain" and "loss" stand only where the interval excludes 0. A class that neither truth nor prediction of a '
        "volume holds is not counted; one that only one of them holds: Dice 0, distance the volume's diagonal.",
    ]
    for label, found in results["labels"].items():
        for part, summary in found["summary"].items():
            for measure, table in ((name, table) for name, table in summary.items() if table):
                lines += ["", f"## {label}, {part}: {MEASURES[measure]}", "", *table_of(score_rows(table))]
                lines += ["", *table_of(difference_rows(table, measure, references(found["runs"])))]
        if found["probes"]:
            lines += ["", f"## {label}, validation: linear heads on frozen bodies, Dice, %", ""]
            lines += table_of(probe_rows(found["probes"]))
        lines += ["", f"## {label}: what each arm cost", "", *table_of(cost_rows(found["runs"]))]
    for path in drawn:
        title = path.stem.replace("_", " ").capitalize()
        lines += ["", f"## {title}", "", f"![{title}]({path.parent.name}/{path.name})"]
    programs = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += ["", "## What each arm's last step was trained with", "", *table_of(choice_rows(results["choices"]))]
    lines += ["", f"{programs}.", ""]
    return "\n".join(lines)


def control_line(control: dict) -> str:
    """Passed or not, and the two differences."""
    shown = ", ".join(f"{name} {cell(entry)}" for name, entry in control.items() if name != "passed")
    verdict = "passed" if control["passed"] else "FAILED, so no claim about a method can be made on this data"
    return f"positive control {verdict} ({shown})"


def cell(difference: dict | None) -> str:
    """ "+2.1 [+0.4, +3.6]"."""
    if difference is None:
        return "-"
    interval = difference["interval"]
    return f"{difference['mean']:+.1f}" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")


def verdict(difference: dict | None, measure: str) -> str:
    """Gain, loss, or nothing where the interval holds 0."""
    return {1: "gain", -1: "loss", 0: ""}[(difference or {"sign": 0})["sign"] * BETTER[measure]]


def score_rows(table: dict) -> list[list[str]]:
    """A header and one row per arm: means over seeds."""
    columns = list(next(iter(table.values()), {}))
    rows = [["", *columns]]
    for arm, row in table.items():
        rows.append([arm, *(f"{row[column]['mean']:.1f}" if column in row else "-" for column in columns)])
    return rows


def difference_rows(table: dict, measure: str, against: list[str]) -> list[list[str]]:
    """A header and one row per arm: mean, and the paired difference of the means from each reference."""
    rows = [["", "mean", *(text for name in against for text in (f"minus {name}", ""))]]
    for arm, row in table.items():
        shown = [row["mean"].get(f"minus {name}") for name in against]
        rows.append(
            [arm, f"{row['mean']['mean']:.1f}", *(t for entry in shown for t in (cell(entry), verdict(entry, measure)))]
        )
    return rows


def probe_rows(probes: dict) -> list[list[str]]:
    """A header and one row per body: mean, and the paired difference from a random one."""
    rows = [["", "mean", "minus random", ""]]
    for body, entry in probes.items():
        difference = entry.get("minus random")
        rows.append([body, f"{entry['mean']:.1f}", cell(difference), verdict(difference, "dice")])
    return rows


def cost_rows(runs: list[dict]) -> list[list[str]]:
    """Iterations and seconds of every arm's whole chain, as if trained alone, and of its last step; over seeds."""
    rows = [["", "iterations", "seconds", "ms per step of the last"]]
    for arm in runs[0]["arms"]:
        entries = [run["arms"][arm] for run in runs]
        iterations, seconds = (sum(entry[key] for entry in entries) / len(entries) for key in ("iterations", "seconds"))
        last = [entry["steps"][arm] for entry in entries]
        pace = 1000 * sum(step["seconds"] for step in last) / sum(step["iterations"] for step in last)
        rows.append([arm, f"{iterations:.0f}", f"{seconds:.1f}", f"{pace:.0f}"])
    return rows


def choice_rows(choices: dict[str, Choice]) -> list[list[str]]:
    """A header and one row per arm: learning rate, and what else was chosen."""
    rows = [["", "learning rate", "", ""]]
    for arm, choice in choices.items():
        others = [(name, value) for name, value in choice.items() if name != "lr"]
        name, value = others[0] if others else ("", "")
        rows.append([arm, f"{choice['lr']:g}", name.replace("_", " "), f"{value:g}" if others else ""])
    return rows


def table_of(rows: list[list[str]]) -> list[str]:
    """The rows as a Markdown table, numbers to the right."""
    header, *body = rows
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
