"""The comparison's figures, each one PNG from results.json and, for the pictures, the first trial's networks."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.data.slices import Slices
from examples.evaluate import segment
from examples.figures import class_colours, class_map, key, save, show
from examples.paired import references
from examples.report import spaced
from examples.trials import Trial

ZONE = "mean, "  # begins a column of the summary that is a zone
SHOWN = 5  # arms in the grid of pictures: the first ones, not chosen by result
COLOURS = ["#1f5a99", "#e39a4a", "#59a96a", "#d1495b", "#8e6c8a", "#3fa7d6", "#b9b9b9", "#f2c14e", "#20242b"]


def draw(folder: Path, results: dict, slices: Slices, trials: dict[tuple[str, int], Trial]) -> list[Path]:
    """Draws what the results allow: test where it was read, else validation."""
    drawn = []
    for label, found in results["labels"].items():
        part = "test" if "test" in found["summary"] else "validation"
        table = found["summary"][part]["dice"]
        for name in references(found["runs"]):
            if any(f"minus {name}" in row["mean"] for row in table.values()):
                drawn.append(folder / f"{label}_paired_with_{name}.png")
                paired_dots(drawn[-1], table, name, part)
        if any(column.startswith(ZONE) for row in table.values() for column in row):
            drawn.append(folder / f"{label}_zones.png")
            zone_lines(drawn[-1], table, part)
        if found["probes"]:
            drawn.append(folder / f"{label}_frozen_bodies.png")
            probe_bars(drawn[-1], found["probes"])
    if len(results["labels"]) > 1:
        drawn.append(folder / "labels.png")
        tables = {label: found["summary"][part]["dice"] for label, found in results["labels"].items()}
        label_lines(drawn[-1], tables, part)
    trial = next(iter(trials.values()))
    if shown := spaced(slices, trial.split.test if part == "test" else trial.split.val):
        drawn.append(folder / "segmentations.png")
        pictures(drawn[-1], trial, slices, shown, list(table)[:SHOWN])
    return drawn


def paired_dots(path: Path, table: dict, reference: str, part: str) -> None:
    """Per arm its difference to the reference: a dot per seed, the mean and its interval."""
    rows = {arm: row["mean"][key] for arm, row in table.items() if (key := f"minus {reference}") in row["mean"]}
    figure = Figure(figsize=(7, 1 + 0.34 * len(rows)))
    axes = figure.subplots()
    axes.axvline(0, color="#b9b9b9", linewidth=1)
    for place, difference in enumerate(rows.values()):
        colour = {1: "#2e9e5b", -1: "#c8322f", 0: "#555555"}[difference["sign"]]
        axes.plot(difference["values"], [place] * len(difference["values"]), ".", color=colour, alpha=0.45)
        axes.plot(difference["mean"], place, "D", color=colour, markersize=5)
        if difference["interval"]:
            axes.plot(difference["interval"], [place, place], color=colour, linewidth=2)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"Dice on {part} minus {reference}, per seed")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def zone_lines(path: Path, table: dict, part: str) -> None:
    """Mean Dice of each arm in each zone."""
    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    for number, (arm, row) in enumerate(table.items()):
        values = {column.removeprefix(ZONE): cell["mean"] for column, cell in row.items() if column.startswith(ZONE)}
        axes.plot(list(values), list(values.values()), **line_style(number), markersize=4, label=arm)
    finish(axes, f"mean Dice on {part}, %")
    save(figure, path)


def probe_bars(path: Path, probes: dict) -> None:
    """Mean Dice of a linear head on each frozen body; dots are the seeds."""
    figure = Figure(figsize=(7, 1 + 0.34 * len(probes)))
    axes = figure.subplots()
    for place, entry in enumerate(probes.values()):
        axes.barh(place, entry["mean"], color=COLOURS[0], alpha=0.6)
        axes.plot(list(entry["by_seed"].values()), [place] * len(entry["by_seed"]), "k.", markersize=4)
    axes.set_yticks(range(len(probes)), list(probes))
    axes.invert_yaxis()
    axes.set_xlabel("Dice on validation of a linear head, %")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def label_lines(path: Path, tables: dict[str, dict], part: str) -> None:
    """Mean Dice of each arm against the number of labels; bars reach from the worst seed to the best."""
    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    counts = [int("".join(filter(str.isdigit, label))) for label in tables]
    for number, arm in enumerate(next(iter(tables.values()))):
        cells = [table[arm]["mean"] for table in tables.values()]
        middle = np.array([cell["mean"] for cell in cells])
        ends = np.array([[f(cell["by_seed"].values()) for cell in cells] for f in (min, max)])
        errors = np.abs(ends - middle)
        axes.errorbar(counts, middle, errors, **line_style(number), markersize=4, capsize=2, label=arm)
    axes.set_xticks(counts)
    axes.set_xlabel(f"labelled {next(iter(tables)).rstrip('0123456789')}")
    finish(axes, f"mean Dice on {part}, %")
    save(figure, path)


def line_style(number: int) -> dict[str, str]:
    """Of the arm of this number: solid lines with dots, then the same colours dashed with squares."""
    dashed = number >= len(COLOURS)
    marks = {"marker": "s" if dashed else "o", "linestyle": "--" if dashed else "-"}
    return marks | {"color": COLOURS[number % len(COLOURS)]}


def finish(axes, title: str) -> None:
    """The axis title, legend and grid that the line plots share."""
    axes.set_ylabel(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def pictures(path: Path, trial: Trial, slices: Slices, shown: list[int], arms: list[str]) -> None:
    """A row per slice: image, truth, and what each arm predicts."""
    images = slices.unpadded(slices.take(shown)[0], shown)
    columns = {"truth": slices.truth(shown)}
    columns |= {arm: segment(trial.network(arm), slices, shown) for arm in arms}
    figure = Figure(figsize=(2 * (1 + len(columns)), 2.4 * len(shown)))
    grid = figure.subplots(len(shown), 1 + len(columns), squeeze=False)
    for row, i in enumerate(shown):
        show(grid[row, 0], images[row][0].numpy(), "image" if row == 0 else "", cmap="gray")
        grid[row, 0].set_ylabel(slices.ids[i], fontsize=8)
        for axes, (name, maps) in zip(grid[row, 1:], columns.items(), strict=True):
            title = name if row == 0 else ""
            show(axes, maps[row].numpy(), title, **class_map(len(slices.classes)))
    key(grid[-1, 1], class_colours(slices.classes))
    figure.tight_layout()
    save(figure, path)
