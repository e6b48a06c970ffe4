"""Tables and figures from a results file: `python -m benchmarks.plot [benchmarks/results/cpu.json]`.

Writes beside the results what they say: cpu.md (every table), time.png and memory.png; and puts the figures of
benchmarks/results/cpu.json into the README and docs/numbers.md, between their marks. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"

# Families of methods that compute the same loss: text, colour. The first is this package.
FAMILIES = {
    "SupCon": {
        "supcon": ("hpcloss SupCon", "tab:blue"),
        "eager_supcon": ("eager SupCon (SupContrast's formula)", "tab:red"),
        "compiled_supcon": ("`torch.compile` of it", "tab:orange"),
        "pml_supcon": ("pytorch-metric-learning SupConLoss", "tab:purple"),
    },
    "NT-Xent": {
        "ntxent": ("hpcloss NT-Xent", "tab:blue"),
        "lightly_ntxent": ("lightly NTXentLoss", "tab:red"),
        "monai_contrastive": ("MONAI ContrastiveLoss", "tab:brown"),
        "pml_ntxent": ("pytorch-metric-learning NTXentLoss", "tab:purple"),
    },
    "InfoNCE": {
        "infonce": ("hpcloss InfoNCE", "tab:blue"),
        "eager_infonce": ("eager InfoNCE", "tab:red"),
        "linear_cross_entropy": ("`F.linear_cross_entropy` InfoNCE", "tab:green"),
        "info_nce_pytorch": ("info-nce-pytorch", "tab:olive"),
    },
}
OTHERS = {
    "published_phpc": "hpcloss, 8192 pixels",
    "block_loop": "the published block loop, as meant",
    "pixel_contrast": "hpcloss PixelContrastLoss",
    "contrastiveseg": "ContrastiveSeg's way: a loop of nonzero, then dense",
}
TEXTS = {method: text for family in FAMILIES.values() for method, (text, _) in family.items()} | OTHERS
# What is shown beside N: the group of its rows, the figures that name a column.
AXES = {
    "width D": ("SupCon against D", ("dim",)),
    "classes": ("SupCon against classes", ("classes",)),
    "regions": ("block loop against regions", ("regions",)),
    "images, side, classes": ("sampled pixels", ("images", "side", "classes")),
}
README_SIZES = (256, 1024, 4096, 8192, 16384)
SYNCS = (
    "Host syncs: operators of one step, forward and backward, for which the host would wait for a GPU (`item` and"
    " truth of a tensor, `nonzero`, indexing with a mask, `masked_select`, `unique`, `equal`, `bincount`, `tolist`,"
    " `numpy`, `cpu`); ours on the path of a GPU, where there is no data to read."
)


# --------------------------------------------------------------------------------------------------------- tables


def _number(value: float | None) -> str:
    if value is None or value >= 1000:
        return "" if value is None else f"{value:.0f}"
    return f"{value:.6f}" if 0 < value < 1e-4 else f"{value:.3g}"  # in digits: not 9.8e-05 beside 0.00012


def _megabytes(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else "<1"


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def _cell(row: dict | None, passes: bool) -> str:
    """Seconds and (peak MB); with `passes` those of forward + backward."""
    if row is None or row["seconds"] is None:
        return "" if row is None else row.get("note", "")
    seconds = _number(row["seconds"])
    if passes and "forward_seconds" in row:
        seconds = f"{_number(row['forward_seconds'])} + {_number(row['backward_seconds'])}"
    return f"{seconds} ({_megabytes(row['peak_mb'])})" if "peak_mb" in row else seconds


def _methods(rows: dict[tuple[str, object], dict], columns: dict[object, str], name: str, passes: bool) -> list[str]:
    """One line for each method: host syncs, then its cells. rows: by (method, column); columns: their heads."""
    lines = []
    for method, text in TEXTS.items():
        of_method = {column: rows[method, column] for column in columns if (method, column) in rows}
        if of_method:
            syncs = sorted({row["syncs"] for row in of_method.values() if "syncs" in row})
            span = " to ".join(map(str, dict.fromkeys([*syncs[:1], *syncs[-1:]])))
            lines.append([text, span, *(_cell(of_method.get(column), passes) for column in columns)])
    return _lines([name, "host syncs", *columns.values()], lines)


def against_n(document: dict, passes: bool = False, sizes: tuple[int, ...] | None = None) -> list[str]:
    """Time and memory of every method against N."""
    found = {(row["method"], row["n"]): row for row in document["rows"] if row["group"].endswith("against N")}
    columns = {n: f"N = {n}" for n in sorted({n for _, n in found}) if sizes is None or n in sizes}
    return _methods(found, columns, f"seconds{', forward + backward' if passes else ''} (peak MB)", passes)


def bars(document: dict) -> list[str]:
    rows = [
        [f"`{row['name']}`", _number(bar["ratio"]), bar["bar"], "yes" if bar["met"] else "no"]
        for row in document["rows"]
        for bar in row.get("bars", ())
    ]
    return _lines(["benchmark", "figure", "bar", "met"], rows)


def source(document: dict) -> str:
    """Where the figures come from, in one line."""
    device, versions = document["device"], document["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device['cpu']}, {device['cores']} cores, {named}, {document['date']}: `{document['command']}`"


def tables(document: dict) -> Iterator[str]:
    """The lines of cpu.md."""
    rows = document["rows"]
    yield from ["# Measured", "", source(document), "", "One thread and D = 128 unless a row says otherwise.", SYNCS]
    yield from ["", "## Bars", "", *bars(document), "", "## Against N", "", *against_n(document, passes=True)]
    for name, (group, names) in AXES.items():
        found = {(row["method"], tuple(row[x] for x in names)): row for row in rows if row["group"] == group}
        columns = {column: " x ".join(map(str, column)) for column in sorted({column for _, column in found})}
        if found:
            head = f"seconds, forward + backward (peak MB), by {name}"
            yield from ["", f"## Against {name}", "", *_methods(found, columns, head, True)]
    losses = [row for row in rows if row["group"] == "every loss"]
    if losses:
        lines = [[f"`{row['method']}_loss`", _cell(row, True), str(row.get("syncs", ""))] for row in losses]
        head = ["loss", "seconds, forward + backward (peak MB)", "host syncs"]
        yield from ["", "## Every loss", "", *_lines(head, lines)]
    ratios = ("work_ratio", "copy_ratio")
    steps = [row for row in rows if row["seconds"] is not None and "method" not in row]
    lines = [
        [f"`{row['name']}`", _number(row["seconds"]), *(_number(row.get(ratio)) for ratio in ratios)] for row in steps
    ]
    head = ["the rest", "seconds", "over its matmuls", "over a copy of its bytes"]
    yield from ["", "## Steps", "", *_lines(head, lines), ""]


def readme(document: dict) -> list[str]:
    """What the README shows."""
    met = [bar["met"] for row in document["rows"] for bar in row.get("bars", ())]
    missed = [f"`{row['name']}`" for row in document["rows"] if any(not bar["met"] for bar in row.get("bars", ()))]
    verdict = f"{sum(met)} of {len(met)} bars are met" + (f", missed in {', '.join(missed)}." if missed else ".")
    return [*against_n(document, sizes=README_SIZES), "", source(document), "", verdict]


BLOCK = re.compile(r"(<!-- from benchmarks/results/cpu.json -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"^(\| `(bench_[^`]+)` \| `([^`]+)` \| )([^| ]+)", re.M)


def with_figures(text: str, document: dict) -> str:
    """A page whose block, and whose table of single figures, hold those of the results."""
    measured = {row["name"]: row for row in document["rows"]}

    def figure(match: re.Match) -> str:
        digits = len(match[4].partition(".")[2])
        return f"{match[1]}{measured[match[2]][match[3]]:.{digits}f}"

    block = "\n".join([*readme(document), ""])
    return FIGURE.sub(figure, BLOCK.sub(lambda match: match[1] + block + match[2], text))


# -------------------------------------------------------------------------------------------------------- figures


def points(document: dict, family: str, method: str, field: str) -> list[tuple[int, float]]:
    """What a line of a figure joins, by N. A logarithm has no place for 0: of few rows no memory beyond the inputs."""
    rows = [row for row in document["rows"] if row["group"] == f"{family} against N" and row["method"] == method]
    return sorted((row["n"], row[field]) for row in rows if row.get(field))


def draw(document: dict, folder: Path) -> list[Path]:
    """Time and memory against N, one panel for each family."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    written = []
    labels = {"seconds": "seconds, forward and backward", "peak_mb": "peak memory beyond the inputs, MB"}
    for name, field in (("time", "seconds"), ("memory", "peak_mb")):
        figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True, constrained_layout=True)
        for axes, (family, methods) in zip(panels, FAMILIES.items(), strict=True):
            for method, (text, colour) in methods.items():
                if line := points(document, family, method, field):
                    axes.plot(*zip(*line, strict=True), color=colour, label=text.replace("`", ""), marker="o", ms=3.5)
            axes.set_title(family, fontsize=10)
            axes.set_xlabel("rows N (D = 128, fp32, one thread)")
            axes.grid(True, which="major", alpha=0.3)
            if axes.lines:
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel(labels[field])
        device, versions = document["device"], document["versions"]
        figure.suptitle(f"{device['cpu']}, torch {versions['torch']}, {document['date']}", fontsize=8)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    results = parser.parse_args().results
    document = json.loads(results.read_text())
    table = results.with_suffix(".md")
    table.write_text("\n".join(tables(document)))
    written = [table, *draw(document, results.parent)]
    if results.resolve() == RESULTS:
        for page in (ROOT / "README.md", ROOT / "docs" / "numbers.md"):
            page.write_text(with_figures(page.read_text(), document))
            written.append(page)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
