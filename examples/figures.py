"""The report's figures. Each function draws one PNG from plain arrays; nothing here trains or decides anything."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.files import write_atomically

CLASS_COLOURS = ["#20242b", "#3fa7d6", "#59a96a", "#f2c14e", "#d1495b", "#8e6c8a", "#e98a3c", "#9ad1d4", "#b8b8b8"]
ARM_COLOURS = {"ours": "#1f5a99", "supervised_iterations": "#b9b9b9", "supervised_seconds": "#e39a4a"}
RIGHT, GAINED, LOST = "#d7dbe0", "#2e9e5b", "#c8322f"


def class_map(classes: int) -> dict:
    """The options of `show` for class ids: one colour each."""
    colours = ListedColormap([CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(classes)])
    return {"cmap": colours, "vmin": -0.5, "vmax": classes - 0.5}


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130, bbox_inches="tight"))


def upright(image: np.ndarray) -> np.ndarray:
    """[x, y] with y towards the front, as [row, column] with the front on top."""
    return np.flipud(image.T)


def show(axes, image: np.ndarray, title: str = "", **options) -> None:
    """One picture without ticks."""
    axes.imshow(upright(image), interpolation="nearest", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def key(axes, colours: dict[str, str]) -> None:
    """What the colours mean, below a picture of the last row."""
    patches = [Patch(facecolor=colour, edgecolor="#888888", label=name) for name, colour in colours.items()]
    axes.legend(handles=patches, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.02))


def class_colours(classes: tuple[str, ...]) -> dict[str, str]:
    """The colour of each class by its name, as `class_map` has them."""
    return {name: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, name in enumerate(classes)}


def dice_bars(path: Path, summary: dict, titles: dict[str, str], part: str) -> None:
    """Dice per class of the segmenting arms; dots are the seeds."""
    arms = [arm for arm in ARM_COLOURS if arm in summary["dice"]]
    columns = list(summary["dice"][arms[0]])
    figure = Figure(figsize=(1.6 + 1.5 * len(columns), 3.6))
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        at = np.arange(len(columns)) + (place - (len(arms) - 1) / 2) * width
        cells = [summary["dice"][arm].get(column, {"mean": np.nan, "values": []}) for column in columns]
        bars = axes.bar(at, [c["mean"] for c in cells], width * 0.92, color=ARM_COLOURS[arm], label=titles[arm])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=6)
        for x, cell in zip(at, cells, strict=True):
            if len(cell["values"]) > 1:
                axes.plot([x] * len(cell["values"]), cell["values"], "k.", markersize=4)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel(f"Dice on {part}, %")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def learning_curves(path: Path, runs: list[dict], titles: dict[str, str]) -> None:
    """Validation Dice against iterations and against seconds; ours begins where its pre-training ends."""
    figure = Figure(figsize=(9.5, 3.4))
    for axes, key, unit in zip(
        figure.subplots(1, 2, sharey=True), ("iteration", "seconds"), ("iterations", "seconds"), strict=True
    ):
        for arm, colour in ARM_COLOURS.items():
            drawn = False
            for run in runs:
                curve = [p for p in run["arms"].get(arm, {}).get("curve", []) if p["dice"] is not None]
                if curve:
                    axes.plot(
                        [p[key] for p in curve],
                        [p["dice"] for p in curve],
                        "o-",
                        color=colour,
                        markersize=3,
                        linewidth=1.3,
                        label=None if drawn else titles[arm],
                    )
                    drawn = True
        axes.set_xlim(left=0)
        axes.set_xlabel(f"training {unit}, pre-training included")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("mean Dice on validation, %")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def segmentations(
    path: Path, ids: list[str], images, truth, baseline, ours, classes: tuple[str, ...], baseline_title: str
) -> None:
    """A row per slice: image, truth, baseline, ours, and the pixels that ours gained and lost against the baseline."""
    figure = Figure(figsize=(10, 2.3 * len(ids)))
    grid = figure.subplots(len(ids), 5, squeeze=False)
    colours = class_map(len(classes))
    for row, name in enumerate(ids):
        first = row == 0
        show(grid[row, 0], images[row], "image" if first else "", cmap="gray")
        grid[row, 0].set_ylabel(name, fontsize=8)
        show(grid[row, 1], truth[row], "truth" if first else "", **colours)
        show(grid[row, 2], baseline[row], baseline_title if first else "", **colours)
        show(grid[row, 3], ours[row], "three stages" if first else "", **colours)
        right, was_right = ours[row] == truth[row], baseline[row] == truth[row]
        change = np.zeros(truth[row].shape, int)
        change[(truth[row] > 0) | (ours[row] > 0) | (baseline[row] > 0)] = 1
        change[right & ~was_right] = 2
        change[~right & was_right] = 3
        title = f"gained {int((change == 2).sum())}, lost {int((change == 3).sum())} px"
        show(grid[row, 4], change, title, cmap=ListedColormap(["white", RIGHT, GAINED, LOST]), vmin=-0.5, vmax=3.5)
    key(grid[-1, 1], class_colours(classes))
    key(grid[-1, 4], {"gained": GAINED, "lost": LOST, "right or wrong in both": RIGHT})
    figure.tight_layout()
    save(figure, path)


def hard_positives(path: Path, ids: list[str], images, truth, hardness, classes: tuple[str, ...], region: int) -> None:
    """A row per slice: image, truth, and 1 - the mean similarity to the positives of the pixel's region."""
    figure = Figure(figsize=(7.4, 2.6 * len(ids)), layout="constrained")
    grid = figure.subplots(len(ids), 3, squeeze=False)
    largest = float(np.nanpercentile(np.concatenate([map_.ravel() for map_ in hardness]), 99))
    for row, name in enumerate(ids):
        first = row == 0
        show(grid[row, 0], images[row], "image" if first else "", cmap="gray")
        grid[row, 0].set_ylabel(name, fontsize=8)
        show(grid[row, 1], truth[row], "truth" if first else "", **class_map(len(classes)))
        title = "1 - mean positive similarity" if first else ""
        show(grid[row, 2], hardness[row], title, cmap="magma", vmin=0, vmax=largest)
        height, width = hardness[row].shape
        for x in range(region, height, region):
            grid[row, 2].axvline(x - 0.5, color="white", linewidth=0.4, alpha=0.5)
        for y in range(region, width, region):
            grid[row, 2].axhline(width - y - 0.5, color="white", linewidth=0.4, alpha=0.5)
    key(grid[-1, 1], class_colours(classes))
    figure.colorbar(grid[0, 2].images[0], ax=grid.ravel().tolist(), shrink=0.6)
    save(figure, path)


def embeddings(path: Path, panels: dict[str, np.ndarray], labels: np.ndarray, names: tuple[str, ...]) -> None:
    """The first two principal components of the same pixels in each panel, coloured by class."""
    figure = Figure(figsize=(4.4 * len(panels), 4))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(grid, panels.items(), strict=True):
        for number, name in enumerate(names):
            chosen = points[labels == number]
            colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=5, alpha=0.55, linewidths=0, color=colour, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first component")
    grid[0].set_ylabel("second component")
    grid[-1].legend(frameon=False, fontsize=8, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
