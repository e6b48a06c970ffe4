"""The comparison on real data: results that are kept, and the tables of docs/does_it_help.md.

    python -m benchmarks.real --keep hippocampus OUT   # of a run of examples.compare into benchmarks/results/real/
    python -m benchmarks.real                          # writes the tables of the page again

A report is kept without its pictures of images, unless the set's terms allow them. On the page a table stands between
`<!-- from SET LABEL KIND -->` and `<!-- end -->`; `TABLES` names the kinds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from examples.compare_report import cell, control_line, difference_rows, markdown, probe_rows, table_of, verdict
from examples.paired import paired_difference, references
from examples.recipes import Iterations, studies

ROOT = Path(__file__).parents[1]
REAL = ROOT / "benchmarks" / "results" / "real"
PAGE = ROOT / "docs" / "does_it_help.md"
FREE = ("nuclei",)  # CC0: their pictures may be shown
PICTURES = "segmentations"
BLOCK = re.compile(r"(<!-- from (\S+) (\S+) (\w+) -->\n).*?(<!-- end -->)", re.S)


def keep(name: str, out: Path) -> None:
    """Copy the results, the report and the figures of a run."""
    folder = REAL / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    named = re.findall(r"\]\((figures/\S+)\)", (out / "report.md").read_text())  # older ones may lie beside them
    shown = [path for path in named if Path(path).stem != PICTURES or name in FREE]
    drawn = [Path(shutil.copy(out / path, folder / "figures")) for path in shown]
    results = json.loads((out / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(results, drawn))


def part_of(found: dict) -> str:
    """The part that is shown: test where it was read."""
    return "test" if "test" in found["summary"] else "validation"


def arms_table(found: dict) -> list[str]:
    """The positive control, then mean Dice of each arm with its differences; without the studies of `contrast`."""
    part, aside = part_of(found), studies(Iterations(), 2)
    dice = {arm: row for arm, row in found["summary"][part]["dice"].items() if arm not in aside}
    rows = difference_rows(dice, "dice", references(found["runs"]))
    rows[0][0] = f"Dice on {part}, %"
    control = control_line(found["positive_control"])
    return [f"{control[0].upper()}{control[1:]}. {len(found['runs'])} seeds.", "", *table_of(rows)]


def studies_table(found: dict, names: tuple[str, ...], against: str) -> list[str]:
    """Mean Dice of these arms, and their paired differences from one of them."""
    part = part_of(found)
    means = {arm: row["mean"] for arm, row in found["summary"][part]["dice"].items()}
    rows = [[f"Dice on {part}, %", "mean", f"minus {against}", ""]]
    for arm in names:
        difference = paired_difference(means[arm]["by_seed"], means[against]["by_seed"]) if arm != against else None
        rows.append([arm, f"{means[arm]['mean']:.1f}", cell(difference), verdict(difference, "dice")])
    return table_of(rows)


def probes_table(found: dict) -> list[str]:
    """Linear heads on frozen bodies, on validation."""
    rows = probe_rows(found["probes"])
    rows[0][0] = "Dice on validation, %"
    return table_of(rows)


def cost_table(found: dict) -> list[str]:
    """Seconds of a step of each arm's last step over those of FixMatch's, the median over seeds."""
    runs = [run["arms"] for run in found["runs"]]
    rows = [["", "time of a step over that of fixmatch"]]
    for arm in runs[0]:
        ratios = sorted(
            seconds_of_a_step(run[arm], arm) / seconds_of_a_step(run["fixmatch"], "fixmatch") for run in runs
        )
        rows.append([arm, f"{ratios[len(ratios) // 2]:.2f}"])
    return table_of(rows)


def seconds_of_a_step(entry: dict, arm: str) -> float:
    """Of the last step of an arm."""
    last = entry["steps"][arm]
    return last["seconds"] / last["iterations"]


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "arms": arms_table,
    "samples": lambda found: studies_table(
        found, ("contrast-k8", "contrast-k32", "contrast-k128", "contrast-k512", "contrast-all"), "contrast-k128"
    ),
    "hardness": lambda found: studies_table(
        found,
        ("contrast", "contrast-hardness0.5", "contrast-hardness1", "contrast-hardness2", "contrast-published"),
        "contrast",
    ),
    "variants": lambda found: studies_table(
        found,
        ("contrast", "contrast-hard-pixels", "contrast-memory", "contrast-head-lr", "contrast-foreground"),
        "contrast",
    ),
    "bodies": probes_table,
    "cost": cost_table,
}


def with_tables(text: str) -> str:
    """The page with its tables as the results say them."""

    def table(match: re.Match[str]) -> str:
        start, name, label, kind, end = match.groups()
        results = json.loads((REAL / name / "results.json").read_text())
        return start + "\n".join(TABLES[kind](results["labels"][label])) + "\n" + end

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("SET", "OUT"), help="a run's results first")
    options = parser.parse_args()
    if options.keep:
        keep(options.keep[0], Path(options.keep[1]))
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(PAGE)


if __name__ == "__main__":
    main()
