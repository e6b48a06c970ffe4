"""Figures and the README's table from a results file.

    python -m benchmarks.plot [benchmarks/results/cpu.json]

Writes time.png and memory.png beside the results and prints the table in Markdown. Needs matplotlib for the figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

METHODS = {
    "supcon": ("hpcloss SupCon", "tab:blue", "-"),
    "eager_supcon": ("eager SupCon", "tab:red", "-"),
    "compiled_supcon": ("torch.compile SupCon", "tab:orange", "-"),
    "infonce": ("hpcloss InfoNCE", "tab:blue", "--"),
    "eager_infonce": ("eager InfoNCE", "tab:red", "--"),
    "linear_cross_entropy": ("F.linear_cross_entropy InfoNCE", "tab:green", "--"),
}
FIGURES = {
    "time": ("seconds", "seconds, forward and backward"),
    "memory": ("peak_mb", "peak memory beyond the inputs, MB"),
}


def against_n(rows: list[dict], field: str) -> dict[str, list[tuple[int, float]]]:
    """Points (N, figure) of each method, by ascending N."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "method" in row and row.get(field) is not None:
            points.setdefault(row["method"], []).append((row["n"], row[field]))
    return {method: sorted(points[method]) for method in METHODS if method in points}


def draw(document: dict, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    written = []
    for name, (field, label) in FIGURES.items():
        figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
        for method, points in against_n(document["rows"], field).items():
            text, colour, style = METHODS[method]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=text, marker="o", markersize=3.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rows N (D = 128, fp32, one thread)")
        axes.set_ylabel(label)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        device, versions = document["device"], document["versions"]
        axes.set_title(f"{device['cpu']}, torch {versions['torch']}, {document['date']}", fontsize=8)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def table(document: dict) -> str:
    """Every figure with a bar, then time and memory against N, in Markdown."""
    lines = ["| benchmark | figure | bar | met |", "|---|---|---|---|"]
    for row in document["rows"]:
        for bar in row.get("bars", ()):
            met = "yes" if bar["met"] else "no"
            lines.append(f"| `{row['name']}` | {_number(bar['ratio'])} | {bar['bar']} | {met} |")
    seconds, memory = (against_n(document["rows"], field) for field in ("seconds", "peak_mb"))
    sizes = sorted({n for points in memory.values() for n, _ in points})
    lines += [
        "",
        "| seconds (peak MB) | " + " | ".join(f"N = {n}" for n in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    notes = {(row["method"], row["n"]): row["note"] for row in document["rows"] if "note" in row and "method" in row}
    for method, (text, _, _) in METHODS.items():
        if method not in seconds:
            continue
        cells = []
        for n in sizes:
            time, peak = dict(seconds[method]).get(n), dict(memory.get(method, ())).get(n)
            cells.append(f"{_number(time)} ({_number(peak)})" if time is not None else notes.get((method, n), ""))
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    device = document["device"]
    lines += ["", f"{device['cpu']}, {device['cores']} cores, {document['date']}: `{document['command']}`"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "cpu.json"
    parser.add_argument("results", nargs="?", type=Path, default=default)
    results = parser.parse_args().results
    document = json.loads(results.read_text())
    print(table(document))
    for path in draw(document, results.parent):
        print(path)


if __name__ == "__main__":
    main()
