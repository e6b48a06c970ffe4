"""Tables and figures from a results file: `python -m benchmarks.plot [benchmarks/results/cpu.json]`.

Writes beside the results: cpu.md (every table), front.png (the README's figure), time.png and memory.png; and puts
the figures of benchmarks/results/cpu.json into the README and docs/benchmarks.md, between their marks. Needs
matplotlib.
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
        "supcon": ("hpcloss SupCon", "#3f51b5"),
        "eager_supcon": ("eager SupCon (SupContrast's formula)", "#c8442f"),
        "compiled_supcon": ("`torch.compile` of it", "#c77c02"),
        "pml_supcon": ("pytorch-metric-learning SupConLoss", "#7b5aa6"),
    },
    "NT-Xent": {
        "ntxent": ("hpcloss NT-Xent", "#3f51b5"),
        "lightly_ntxent": ("lightly NTXentLoss", "#c8442f"),
        "monai_contrastive": ("MONAI ContrastiveLoss", "#8d6e63"),
        "pml_ntxent": ("pytorch-metric-learning NTXentLoss", "#7b5aa6"),
    },
    "InfoNCE": {
        "infonce": ("hpcloss InfoNCE", "#3f51b5"),
        "eager_infonce": ("eager InfoNCE", "#c8442f"),
        "linear_cross_entropy": ("`F.linear_cross_entropy` InfoNCE", "#2e8b57"),
        "info_nce_pytorch": ("info-nce-pytorch", "#c77c02"),
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
PAGE_SIZES = (64, 1024, 4096, 8192, 16384)  # with the method's name six columns, which fit a laptop
# The README's figure and sentence: one loss, as people compute it. Text, colour.
FRONT = {
    "supcon": ("hpcloss", "#3f51b5"),
    "compiled_supcon": ("torch.compile", "#c77c02"),
    "eager_supcon": ("eager PyTorch", "#c8442f"),
    "pml_supcon": ("pytorch-metric-learning", "#7b5aa6"),
}
FRONT_N = 8192  # the largest N that every one of them finishes
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


def against_n(document: dict, passes: bool = False) -> list[str]:
    """Time and memory of every method against N."""
    found = _by_method_and_n(document)
    columns = {n: f"N = {n}" for n in sorted({n for _, n in found})}
    return _methods(found, columns, f"seconds{', forward + backward' if passes else ''} (peak MB)", passes)


def _by_method_and_n(document: dict) -> dict[tuple[str, int], dict]:
    return {(row["method"], row["n"]): row for row in document["rows"] if row["group"].endswith("against N")}


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


# ------------------------------------------------------------------------------------------------------- on pages


def time_of(seconds: float) -> str:
    """Two significant digits, in the unit that suits them."""
    value, unit = (seconds, "s") if seconds >= 0.095 else (1e3 * seconds, "ms")
    return f"{value:.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f} {unit}"


def memory_of(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes >= 1 else "< 1 MB"


def page_table(document: dict, what: str) -> list[str]:
    """Time, or memory and host syncs, of every method against N."""
    found, lines = _by_method_and_n(document), []
    sizes = PAGE_SIZES if what == "time" else PAGE_SIZES[1:]
    for method, text in TEXTS.items():
        of_method = {n: row for (name, n), row in found.items() if name == method}
        if not of_method:
            continue
        cells = []
        for n in sizes:
            row = of_method.get(n, {"seconds": None})
            if row["seconds"] is None:
                cells.append(row.get("note", "not measured").replace("more than", ">"))
            else:
                cells.append(time_of(row["seconds"]) if what == "time" else memory_of(row["peak_mb"]))
        if what == "memory":
            syncs = sorted({row["syncs"] for row in of_method.values() if "syncs" in row})
            cells.append(", ".join(map(str, syncs)) or "not counted")
        lines.append([text, *cells])
    heads = [f"N = {n:,}" for n in sizes] + (["host syncs"] if what == "memory" else [])
    return _lines([{"time": "a step", "memory": "peak"}[what], *heads], lines)


MEMBER = re.compile(r"(\w+)\[(?:(.+?)-)?(\d+)\]")  # of a benchmark that is run for several numbers of rows


def missed(document: dict) -> list[str]:
    """How many bars each benchmark misses: one line for all its numbers of rows."""
    lines: dict[str, list[tuple[dict, str]]] = {}
    for row in document["rows"]:
        member = MEMBER.fullmatch(row["name"])
        name = row["name"] if member is None else member[1] + (f"[{member[2]}]" if member[2] else "")
        lines.setdefault(name, []).extend((bar, "" if member is None else member[3]) for bar in row.get("bars", ()))
    table = []
    for name, of_name in lines.items():
        few = [(bar, size) for bar, size in of_name if not bar["met"]]
        if few:
            sizes = ", ".join(dict.fromkeys(size for _, size in few if size))
            # Of bars on a share of the same kind the worst; those on microseconds are of another kind.
            bar = max((bar for bar, _ in few), key=lambda bar: (bar["bar"].startswith("time over"), bar["ratio"]))
            worst = f"{_number(bar['ratio'])} ({bar['bar']})"
            table.append([f"`{name}`", f"{len(few)} of {len(of_name)}", sizes, worst])
    every = [bar["met"] for row in document["rows"] for bar in row.get("bars", ())]
    lead = f"{sum(every)} of {len(every)} bars are met."
    return [lead, "", *_lines(["benchmark", "missed", "rows, or side", "worst (its bar)"], table)] if table else [lead]


def summary(document: dict) -> list[str]:
    """The README's sentences: the largest size that all finish, and where hpcloss is slower."""
    found = _by_method_and_n(document)
    costs = {method: found[method, FRONT_N] for method in FRONT}
    parts = [
        f"{FRONT[method][0]} {time_of(row['seconds'])} and {memory_of(row['peak_mb'])}"
        for method, row in sorted(costs.items(), key=lambda cost: cost[1]["seconds"])
    ]
    loss = f"SupCon of {FRONT_N:,} embeddings, D = 128, forward and backward on one CPU thread: {'; '.join(parts)}."
    slower: dict[int, float] = {}  # by N: the largest quotient over PyTorch, of all small problems
    for row in document["rows"]:
        over = [ratio for name, ratio in row.items() if name.startswith(("over_eager_", "over_compiled_"))]
        if row["group"] == "small problems" and over:
            slower[row["n"]] = max([slower.get(row["n"], 0.0), *over])
    some = ", ".join(f"{slower[n]:.1f} times as long at N = {n:,}" for n in sorted(slower) if slower[n] > 1)
    never = min(n for n in slower if all(slower[m] <= 1 for m in slower if m >= n))
    few = (
        f"With few rows the slowest loss takes longer than in PyTorch, eager or compiled: {some};"
        f" from N = {never:,} on none does."
    )
    device = f"{document['device']['cpu']}, torch {document['versions']['torch'].partition('+')[0]}, {document['date']}"
    return [loss, few, f"Measured on {device}."]


BLOCK = re.compile(r"(<!-- (?:(\w+) )?from benchmarks/results/cpu.json -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"^(\| `(bench_[^`]+)` \| `([^`]+)` \| )([^| ]+)", re.M)


def with_figures(text: str, document: dict) -> str:
    """A page whose blocks, and whose table of single figures, hold those of the results."""
    measured = {row["name"]: row for row in document["rows"]}
    # What a block holds by the word in its mark; the README's has none. Tables need an empty line around them.
    content = {
        None: lambda: summary(document),
        "time": lambda: ["", *page_table(document, "time"), ""],
        "memory": lambda: ["", *page_table(document, "memory"), ""],
        "missed": lambda: ["", *missed(document), ""],
        "source": lambda: ["", source(document), ""],
    }

    def figure(match: re.Match) -> str:
        digits = len(match[4].partition(".")[2])
        return f"{match[1]}{measured[match[2]][match[3]]:.{digits}f}"

    def block(match: re.Match) -> str:
        return match[1] + "\n".join([*content[match[2]](), ""]) + match[3]

    return FIGURE.sub(figure, BLOCK.sub(block, text))


# -------------------------------------------------------------------------------------------------------- figures


def points(document: dict, family: str, method: str, field: str) -> list[tuple[int, float]]:
    """What a line of a figure joins, by N. A logarithm has no place for 0: of few rows no memory beyond the inputs."""
    rows = [row for row in document["rows"] if row["group"] == f"{family} against N" and row["method"] == method]
    return sorted((row["n"], row[field]) for row in rows if row.get(field))


def draw(document: dict, folder: Path) -> list[Path]:
    """The README's figure, and time and memory against N with one panel for each family."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context(STYLE):
        for name, paint in (
            ("front", _front),
            ("time", lambda plt, document: _families(plt, document, "seconds")),
            ("memory", lambda plt, document: _families(plt, document, "peak_mb")),
        ):
            figure = paint(plt, document)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI, metadata={"Software": None})
            plt.close(figure)
    return written


DPI, WIDTH = 160, 10.0  # 1,600 pixels: half as many on a page, with letters of 11 pixels there
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "text.color": "#222222",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
NAMES_OF_TICKS = {
    "seconds": {1e-3: "1 ms", 1e-2: "10 ms", 1e-1: "0.1 s", 1: "1 s", 10: "10 s"},
    "peak_mb": {1: "1 MB", 10: "10 MB", 100: "100 MB", 1000: "1,000 MB"},
}
TITLES = {"seconds": "Time of a step", "peak_mb": "Peak memory beyond the inputs"}


def _logarithmic(axes, field: str, sizes: tuple[int, ...]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_yticks(list(NAMES_OF_TICKS[field]), list(NAMES_OF_TICKS[field].values()))
    axes.grid(True, which="major")
    axes.set_axisbelow(True)


def _front(plt, document: dict):
    """SupCon as people compute it: time and memory side by side, each line with its name and its figure."""
    found = _by_method_and_n(document)
    costs = {method: found[method, FRONT_N] for method in FRONT}
    stopped = sorted(n for (method, n), row in found.items() if method in FRONT and row["seconds"] is None)
    device, versions = document["device"], document["versions"]
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.8))
    figure.subplots_adjust(left=0.058, right=0.845, top=0.91, bottom=0.2, wspace=0.74)
    for axes, field, low, high, sizes in (
        (panels[0], "seconds", 1.2e-4, 60, (16, 64, 256, 1024, 4096, 16384)),
        (panels[1], "peak_mb", 0.7, 3e4, (256, 1024, 4096, 16384)),  # of fewer rows below 1 MB
    ):
        _logarithmic(axes, field, sizes)
        axes.set_xlim(0.75 * sizes[0], 24000)
        axes.set_ylim(low, high)
        axes.set_title(TITLES[field], pad=10)
        axes.set_xlabel("embeddings N")
        axes.axvline(FRONT_N, ymax=0.9, color="#999999", lw=1, ls=(0, (3, 3)), zorder=1)
        for method, (_, colour) in reversed(FRONT.items()):
            line = [point for point in points(document, "SupCon", method, field) if point[1] >= low]
            ours = method == "supcon"
            style = {"lw": 3, "ms": 5.5, "zorder": 4} if ours else {"lw": 1.8, "ms": 4, "zorder": 3}
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", **style)
        if stopped:
            height = 5 * 1024 if field == "peak_mb" else high / 4
            text = "out of memory (> 5 GB):\neager PyTorch, pytorch-metric-learning"
            axes.plot(stopped[0], height, marker="x", color="#c8442f", ms=8, mew=2.2, zorder=5)
            axes.text(stopped[0] * 1.35, high * 0.97, text, ha="right", va="top", fontsize=8, color="#a33524")
        _name_lines(axes, field, costs)
    figure.text(
        0.008, 0.022,
        f"SupCon, forward and backward, D = 128, fp32, one CPU thread ({device['cpu']}), torch"
        f" {versions['torch'].partition('+')[0]}, {document['date']}. Figures beside the panels: N = {FRONT_N:,}.",
        fontsize=8.5, color="#666666",
    )  # fmt: skip
    return figure


def _name_lines(axes, field: str, costs: dict[str, dict]) -> None:
    """Figure and name of each line in a column beside the panel, moved apart where they would overlap."""
    apart = 0.135  # in heights of the panel
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {method: to_axes.transform((FRONT_N, row[field]))[1] for method, row in costs.items()}
    order = sorted(heights, key=heights.__getitem__)
    for _ in range(200):  # neighbours that are too near push each other
        for low, high in zip(order, order[1:]):
            excess = max(0.0, apart - (heights[high] - heights[low]))
            heights[low], heights[high] = heights[low] - excess / 2, heights[high] + excess / 2
    for method in order:
        text, colour = FRONT[method]
        value = (time_of if field == "seconds" else memory_of)(costs[method][field])
        ours = {"weight": "bold"} if method == "supcon" else {}
        place = {"transform": axes.transAxes, "color": colour}
        axes.text(1.03, heights[method], value, va="bottom", fontsize=11, weight="bold", **place)
        axes.text(1.03, heights[method] - 0.005, text, va="top", fontsize=8.5, **ours, **place)


def _families(plt, document: dict, field: str):
    """One panel for each family of methods that compute the same loss."""
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 4.6), sharex=True, sharey=True, constrained_layout=True)
    for axes, (family, methods) in zip(panels, FAMILIES.items(), strict=True):
        for method, (text, colour) in methods.items():
            if line := points(document, family, method, field):
                name = re.sub(r" (\w+Loss|of it|SupCon.*|NT-Xent|InfoNCE)$", "", text.replace("`", ""))
                thick = 2.4 if name == "hpcloss" else 1.5
                axes.plot(*zip(*line, strict=True), color=colour, label=name, marker="o", ms=3.5, lw=thick)
        axes.set_title(family)
        axes.set_xlabel("embeddings N")
        if axes.lines:
            _logarithmic(axes, field, (16, 256, 4096))
            axes.set_ylim(*{"seconds": (1.2e-4, 100), "peak_mb": (0.05, 1e5)}[field])  # room for the legend
            axes.legend(fontsize=8, loc="upper left", borderaxespad=0.1)
    device, versions = document["device"], document["versions"]
    figure.suptitle(
        f"{TITLES[field]}: D = 128, fp32, one thread, {device['cpu']}, torch {versions['torch']}, {document['date']}",
        fontsize=9, color="#666666",
    )  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    results = parser.parse_args().results
    document = json.loads(results.read_text())
    table = results.with_suffix(".md")
    table.write_text("\n".join(tables(document)))
    written = [table, *draw(document, results.parent)]
    if results.resolve() == RESULTS:
        for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
            page.write_text(with_figures(page.read_text(), document))
            written.append(page)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
