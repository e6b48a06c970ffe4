"""report.md and its figures, and the table that the run ends with."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as t_distribution
from torch import Tensor

from examples import figures
from examples.arms import Arms
from examples.data.slices import Slices
from examples.evaluate import Maps, segment
from examples.files import write_json, write_text
from examples.networks import LAST, load_body
from examples.results import BASELINES, PROBE_GAIN, SHUFFLED_LOSS, TITLES, collect, titles_of
from examples.settings import Settings
from examples.stages import initial_network
from examples.training import CHECKPOINT, read_weights
from hpcloss import FeatureTap, ProjectionHead

SHOWN = "supervised_iterations"  # the baseline that pictures are compared with
ROWS = 3  # slices shown in a figure, evenly spaced over the part, not chosen by result
PIXELS = 300  # of each class in the scatter plot


def write_report(options: argparse.Namespace, settings: Settings, slices: Slices, arms: list[Arms]) -> str:
    """Writes results.json, the figures and report.md; returns the closing text for the terminal."""
    results = collect(options, settings, slices)
    write_json(options.out / "results.json", results)
    drawn = draw_figures(options.out / "figures", results, slices, arms[0])
    write_text(options.out / "report.md", markdown(results, drawn))
    lines, titles = [], titles_of(results["runs"])
    for part, summary in results["summary"].items():
        lines += ["", f"Dice on {part}, %", *aligned(dice_rows(summary, titles))]
    lines += ["", *(check_line(check) for check in results["checks"])]
    lines += [f"report   {options.out / 'report.md'}", f"results  {options.out / 'results.json'}"]
    lines += [f"figure   {path}" for path in drawn]
    if "test" not in results["summary"]:
        lines.append("The test subjects were not read; --resume --final reads them.")
    return "\n".join(lines)


def draw_figures(folder: Path, results: dict, slices: Slices, arms: Arms) -> list[Path]:
    """Draws what the finished arms allow; pictures show the first seed of this call."""
    drawn = []

    def path(name: str) -> Path:
        drawn.append(folder / name)
        return drawn[-1]

    part = "test" if "test" in results["summary"] else "validation"
    summary, titles = results["summary"].get(part), titles_of(results["runs"])
    positions = arms.split.test if part == "test" else arms.split.val
    if summary and any(arm in summary["dice"] for arm in figures.ARM_COLOURS):
        figures.dice_bars(path("dice.png"), summary, titles, part)
    curves = [arm.get("curve", []) for run in results["runs"] for arm in run["arms"].values()]
    if any(point["dice"] is not None for curve in curves for point in curve):
        figures.learning_curves(path("curves.png"), results["runs"], titles)
    shown = spaced(slices, positions)
    if not shown:  # no class anywhere
        return drawn
    ids, (images, _), truth = [slices.ids[i] for i in shown], slices.take(shown), slices.truth(shown)
    pictures = planes([image[0] for image in slices.unpadded(images, shown)], truth), planes(truth, truth)
    networks = arms.networks()
    if "stage3" in networks and SHOWN in networks:
        predicted = [segment(networks[name], slices, shown) for name in (SHOWN, "stage3")]
        baseline, ours = (planes(maps, truth) for maps in predicted)
        figures.segmentations(path("segmentations.png"), ids, *pictures, baseline, ours, slices.classes, titles[SHOWN])
    if len(slices.size) == 2 and (arms.folder / "stage2" / CHECKPOINT).is_file():  # whole slices, not windows
        region = arms.settings.region_size
        embedded = slices.unpadded(pixel_embeddings(arms, images), shown)
        maps = [hardness_map(e, y, region).numpy() for e, y in zip(embedded, truth, strict=True)]
        figures.hard_positives(path("hard_positives.png"), ids, *pictures, maps, slices.classes, region)
        panels, labels = scatter(arms, slices, shown)
        figures.embeddings(path("embeddings.png"), panels, labels, slices.classes)
    return drawn


def spaced(slices: Slices, positions: list[int]) -> list[int]:
    """ROWS positions with foreground, each of another subject where there are enough, at evenly spaced planes."""
    foreground = slices.has_foreground()
    usable = [i for i in positions if foreground[i]]
    subjects = sorted({slices.subjects[i] for i in usable})[:ROWS]
    chosen = []
    for number, subject in enumerate(subjects):
        mine = [i for i in usable if slices.subjects[i] == subject]
        chosen.append(mine[(2 * number + 1) * len(mine) // (2 * len(subjects))])
    return chosen


def planes(maps: Maps, truth: Maps) -> list[np.ndarray]:
    """What a figure shows of each map: a slice itself, of a volume the plane with the most foreground."""
    chosen = []
    for array, labels in zip(maps, truth, strict=True):
        plane = () if labels.ndim == 2 else (..., int((labels > 0).sum((0, 1)).argmax()))
        chosen.append(array[plane].numpy())
    return chosen


@torch.no_grad()
def pixel_embeddings(arms: Arms, images: Tensor) -> Tensor:
    """What stage 2's loss sees: unit embeddings [N, D, H, W] behind the projection head."""
    checkpoint = arms.folder / "stage2" / CHECKPOINT
    projector = ProjectionHead(arms.settings.features[5], arms.settings.embedding_dim)
    projector.load_state_dict(read_weights(checkpoint, "projector."))
    return F.normalize(projector.eval()(body_features(arms, "stage2", images)), dim=1)


@torch.no_grad()
def body_features(arms: Arms, stage: str, images: Tensor) -> Tensor:
    """The last decoder block's output of a stage's network."""
    network = initial_network(arms.slices, arms.settings, arms.seed).eval()
    load_body(network, read_weights(arms.folder / stage / CHECKPOINT, "network."))
    _, features = FeatureTap(network, LAST)(images)
    return features


def hardness_map(embeddings: Tensor, labels: Tensor, region: int) -> Tensor:
    """[H, W]: 1 - the mean similarity of each pixel to the other pixels of its class in its region; NaN without any."""
    result = torch.full(labels.shape, torch.nan)
    for x in range(0, labels.shape[0], region):
        for y in range(0, labels.shape[1], region):
            cell = (slice(x, x + region), slice(y, y + region))
            rows, classes = embeddings[(slice(None), *cell)].flatten(1).T, labels[cell].flatten()
            values = torch.full(classes.shape, torch.nan)
            for number in classes.unique():
                mine = classes == number
                count = int(mine.sum())
                if count > 1:
                    positive = (rows[mine] @ rows[mine].sum(0) - 1) / (count - 1)
                    values[mine] = 1 - positive
            result[cell] = values.view(labels[cell].shape)
    return result


def scatter(arms: Arms, slices: Slices, chosen: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pixels of these slices before and after stage 2 as two principal components of the body's unit features."""
    labels = torch.cat([label.flatten() for label in slices.truth(chosen)])
    rng = np.random.default_rng(0)
    picked = []
    for number in range(len(slices.classes)):
        mine = np.flatnonzero((labels == number).numpy())
        picked.append(rng.choice(mine, min(PIXELS, len(mine)), replace=False))
    pixels = torch.from_numpy(np.concatenate(picked))
    panels = {}
    for title, stage in (("before stage 2", "stage1"), ("after stage 2", "stage2")):
        if (arms.folder / stage / CHECKPOINT).is_file():
            features = slices.unpadded(body_features(arms, stage, slices.images[chosen]), chosen)
            rows = F.normalize(torch.cat([feature.flatten(1).T for feature in features])[pixels], dim=1)
            centred = rows - rows.mean(0)
            _, _, axes = torch.linalg.svd(centred, full_matrices=False)
            panels[title] = (centred @ axes[:2].T).numpy()
    return panels, labels[pixels].numpy()


def dice_rows(summary: dict, titles: dict[str, str]) -> list[list[str]]:
    """A header and one row per arm, then one per paired difference."""
    columns = list(next(iter(summary["dice"].values())))
    rows = [["", *columns]]
    for arm, cells in summary["dice"].items():
        rows.append([titles[arm], *(cell(cells.get(column)) for column in columns)])
    for baseline, cells in summary["ours_minus"].items():
        rows.append([f"three stages - {titles[baseline]}", *(cell(cells.get(column), "+") for column in columns)])
    return rows


def cell(value: dict | None, sign: str = "") -> str:
    """ "61.2 ± 1.4", or without the spread for one seed."""
    if value is None:
        return "-"
    sd = "" if value["sd"] is None else f" ± {value['sd']:.1f}"
    return f"{value['mean']:{sign}.1f}{sd}"


def aligned(rows: list[list[str]]) -> list[str]:
    """The rows as text, first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def table(rows: list[list[str]]) -> list[str]:
    """The rows as a Markdown table."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def check_line(check: dict) -> str:
    """What the probes of one seed say; of the built-in demonstration also whether that is enough."""
    gain, loss = f"{check['probe_gain']:+.1f} Dice over a random body", f"{check['shuffled_loss']:+.1f}"
    end = ""
    if "passed" in check:
        gain, end = f"{gain} (asked: {PROBE_GAIN:.0f})", f" (asked: {SHUFFLED_LOSS:.0f}): "
        end += "passed" if check["passed"] else "FAILED"
    text = f"the frozen body of stage 2 is worth {gain} and {loss} over stage 2 on shuffled labels"
    return f"seed {check['seed']}: {text}{end}"


def verdict(summary: dict) -> list[str]:
    """What the paired differences say, no more."""
    lines = []
    for baseline in BASELINES:
        difference = summary["ours_minus"].get(baseline, {}).get("mean")
        if difference is None:
            continue
        values, mean, sd = difference["values"], difference["mean"], difference["sd"]
        against = f"Against {TITLES[baseline].replace('supervised,', 'supervised training at')}"
        if sd is None:
            lines.append(f"- {against}: {mean:+.1f} Dice on one seed, which says nothing about other seeds.")
        else:
            # Few seeds: the spread alone flatters a difference, so say what Student's t leaves of it.
            half = float(t_distribution.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
            told_apart = "told apart from none" if abs(mean) > half else "not told apart from none"
            lines.append(
                f"- {against}: {mean:+.1f} ± {sd:.1f} over {len(values)} seeds, 95 % interval of the mean "
                f"{mean - half:+.1f} to {mean + half:+.1f}: {told_apart}."
            )
    return lines


def markdown(results: dict, drawn: list[Path]) -> str:
    """The report's text."""
    data, settings, runs = results["data"], results["settings"], results["runs"]
    titles = titles_of(runs)
    lines = ["# Three-stage contrastive segmentation", ""]
    noun = data["noun"]
    lines += [f"Data: {data['layout']}. {len(results['splits']['train'])} training {noun}, of which per seed "]
    lines[-1] += f"{len(runs[0]['labelled'])} are labelled; {len(results['splits']['val'])} {noun} for validation, "
    lines[-1] += f"{len(results['splits']['test'])} for test. Iterations of the stages: {list(settings['iterations'])}."
    if data["layout"].startswith("virtual"):
        lines += [
            "",
            "All subjects are one average brain under random warps and contrasts: a demonstration, not a benchmark.",
        ]
    for part, summary in results["summary"].items():
        lines += ["", f"## Dice on {part}, %", "", *table(dice_rows(summary, titles)), "", *verdict(summary)]
    if any(run["arms"] for run in runs):
        lines += ["", "## Cost", "", *table(cost_rows(runs, titles))]
    if results["checks"]:
        lines += ["", "## What stage 2 taught the body", "", *(f"- {check_line(check)}" for check in results["checks"])]
        lines += ["", f"Linear heads trained on the labelled {noun} over a frozen body; Dice on validation."]
    captions = {
        "dice.png": "Dice per class. Dots are seeds.",
        "curves.png": "Validation Dice during training; the three stages begin after their pre-training.",
        "segmentations.png": f"Against {titles[SHOWN]}. First seed.",
        "hard_positives.png": "Where the hard positives are: bright pixels are unlike the rest of their class in "
        "their region (grid), so they get the largest weights. First seed.",
        "embeddings.png": "The same held-out pixels before and after stage 2, first two principal components.",
    }
    for path in drawn:
        lines += ["", f"## {path.stem.replace('_', ' ').capitalize()}", "", captions[path.name], ""]
        lines += [f"![{path.stem}]({path.parent.name}/{path.name})"]
    lines += [
        "",
        f"## Labelled {noun}",
        "",
        *(f"- seed {run['seed']}: {', '.join(abridged(run['labelled']))}" for run in runs),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += ["", f"The ids of every split are in results.json. {versions}.", ""]
    return "\n".join(lines)


def abridged(ids: list[str], most: int = 12) -> list[str]:
    """The first ids and how many more there are."""
    return ids if len(ids) <= most else [*ids[:most], f"and {len(ids) - most} more"]


def cost_rows(runs: list[dict], titles: dict[str, str]) -> list[list[str]]:
    """Iterations and seconds of every trained arm, averaged over the seeds, and the seconds as a multiple of ours."""
    rows = [["", "iterations", "seconds", f"seconds / {TITLES['ours']}"]]
    stages = ("stage1", "stage2", "stage3")
    entries = {
        f"of these, stage {n}": [r["arms"].get("ours", {}).get("stages", {}).get(s) for r in runs]
        for n, s in enumerate(stages, 1)
    }
    named = {titles["ours"]: [run["arms"].get("ours") for run in runs], **entries}
    named |= {titles[arm]: [run["arms"].get(arm) for run in runs] for arm in BASELINES}
    whole = None
    for title, found in named.items():
        found = [entry for entry in found if entry and "iterations" in entry]
        if found:
            steps, seconds = (sum(entry[key] for entry in found) / len(found) for key in ("iterations", "seconds"))
            whole = whole or seconds  # the first row is ours
            rows.append([title, f"{steps:.0f}", f"{seconds:.1f}", f"{seconds / max(whole, 1e-3):.2f}"])
    return rows
