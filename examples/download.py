"""Fetches a data set of the Medical Segmentation Decathlon into a folder that the other commands read.

    python -m examples.download hippocampus    # into data/Task04_Hippocampus
    python -m examples.three_stage --data data/Task04_Hippocampus --out hippocampus

Through MONAI, with a progress bar and the archive's checksum. The sets are CC BY-SA 4.0 (Antonelli et al., 2022).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from monai.apps import DecathlonDataset
from monai.apps.utils import download_url, extractall

NAMES = {task.partition("_")[2].lower(): task for task in DecathlonDataset.resource}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(NAMES), help="which set")
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="FOLDER", help="default %(default)s")
    options = parser.parse_args(argv)
    task = NAMES[options.name]
    folder = options.to / task
    if (folder / "dataset.json").is_file():
        print(f"{folder}: is there already")
        return 0
    archive = options.to / f"{task}.tar"
    try:
        options.to.mkdir(parents=True, exist_ok=True)
        download_url(DecathlonDataset.resource[task], archive, DecathlonDataset.md5[task], "md5", progress=True)
        with tempfile.TemporaryDirectory(dir=options.to) as half:  # an interrupted one leaves no half of a set behind
            extractall(archive, half, has_base=True)
            os.replace(Path(half) / task, folder)
    except (OSError, RuntimeError, ValueError) as error:  # no network, a damaged archive, no space
        print(f"error: {archive}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left half done, start it again", file=sys.stderr)
        return 130
    print(f"{folder}: python -m examples.three_stage --data {folder} --out {options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
