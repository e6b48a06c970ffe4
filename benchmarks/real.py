"""The comparison on real data: results that are kept, and the tables of docs/does_it_help.md.

    python -m benchmarks.real --keep hippocampus OUT   # of a run of examples.compare into benchmarks/results/real/
    python -m benchmarks.real                          # writes the tables of the page again

A report is kept without its pictures of images, unless the set's terms allow them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from examples.compare_report import control_line, difference_rows, markdown, table_of
from examples.paired import references

ROOT = Path(__file__).parents[1]
REAL = ROOT / "benchmarks" / "results" / "real"
PAGE = ROOT / "docs" / "does_it_help.md"
FREE = ("nuclei",)  # CC0: their pictures may be shown
PICTURES = "segmentations"
BLOCK = re.compile(r"(<!-- from (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)


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


def table(name: str, label: str) -> list[str]:
    """The positive control, and mean Dice of each arm with its differences, on test where it was read."""
    found = json.loads((REAL / name / "results.json").read_text())["labels"][label]
    part = "test" if "test" in found["summary"] else "validation"
    rows = difference_rows(found["summary"][part]["dice"], "dice", references(found["runs"]))
    rows[0][0] = f"Dice on {part}, %"
    control = control_line(found["positive_control"])
    return [f"{control[0].upper()}{control[1:]}. {len(found['runs'])} seeds.", "", *table_of(rows)]


def with_tables(text: str) -> str:
    """The page with its tables as the results say them."""
    return BLOCK.sub(lambda match: match[1] + "\n".join(table(match[2], match[3])) + "\n" + match[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("SET", "OUT"), help="a run's results first")
    options = parser.parse_args()
    if options.keep:
        keep(options.keep[0], Path(options.keep[1]))
    if PAGE.is_file():
        PAGE.write_text(with_tables(PAGE.read_text()))
        print(PAGE)
    else:
        print(f"{PAGE}: is not there; no table was written")


if __name__ == "__main__":
    main()
