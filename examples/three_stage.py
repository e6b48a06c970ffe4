"""Three-stage contrastive segmentation with few labels, beside its supervised baselines.

    python -m examples.three_stage --data builtin --out demo                       # 5-8 minutes on two cores
    python -m examples.three_stage --data Task04_Hippocampus --labelled 4 --iterations 1000 2000 6000 --out hippocampus

Stage 1 pre-trains the encoder with IHPC on unlabelled slices, stage 2 encoder and decoder with region PHPC on the
labelled ones, stage 3 segments with a mean teacher. `--stage all` also trains supervised baselines at equal iterations
and at equal seconds and linear heads on frozen bodies. A killed run goes on with --resume.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from examples.arms import Arms
from examples.data.slices import DataError, Slices
from examples.data.splits import draw_split
from examples.files import read_json, write_json
from examples.networks import SMALLEST, STRIDE
from examples.report import write_report
from examples.settings import Settings
from examples.training import quiet, rank


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = parse(argv)
    quiet()
    try:
        run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --out {options.out}", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.three_stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="builtin", help='"builtin" or a folder in MSD or ACDC layout')
    add("--labelled", type=int, default=2, metavar="N", help="labelled training subjects (default 2)")
    add("--slices-per-subject", type=int, metavar="K", help="labelled slices of each (default: builtin 1, folders all)")
    add("--out", type=Path, required=True, help="where checkpoints, results and figures go")
    add("--stage", choices=("all", "1", "2", "3"), default="all", help="one stage alone, without the baselines")
    add("--resume", action="store_true", help="go on in --out from the last checkpoint")
    add("--seed", type=int, default=0, help="seed of the labelled draw, the weights and the batches")
    add("--seeds", type=int, nargs="+", metavar="S", help="several seeds: mean, sd and paired differences")
    add("--device", choices=("cpu", "cuda", "auto"), default="auto")
    add("--devices", type=int, default=1, help="processes or GPUs, data-parallel")
    add("--final", action="store_true", help="also read the test subjects (do this once, with settings fixed)")
    add("--iterations", type=int, nargs=3, default=defaults.iterations, metavar=("S1", "S2", "S3"))
    add("--checkpoint-every", type=int, default=defaults.checkpoint_every, metavar="STEPS", help="default %(default)s")
    add("--crop", type=int, nargs=2, default=defaults.crop, metavar=("H", "W"), help="training crops, in pixels")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="folders: crop or pad slices to this (multiples of 16)")
    add("--spacing", type=float, metavar="MM", help="folders: in-plane pixel size to resample to")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or [options.seed]
    if min(*options.iterations, options.devices, options.checkpoint_every) < 1:
        parser.error("--iterations, --devices and --checkpoint-every must be at least 1")
    if any(side < SMALLEST or side % STRIDE for side in (*options.crop, *(options.size or ()))):
        parser.error(f"--crop and --size must be multiples of {STRIDE}, at least {SMALLEST}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
        parser.error("--seeds must be different numbers from 0")
    return options


def run(options: argparse.Namespace) -> None:
    """Reads the data, trains what is asked for, writes the results and the report."""
    settings = Settings(
        iterations=tuple(options.iterations),
        crop=tuple(options.crop),
        devices=options.devices,
        checkpoint_every=options.checkpoint_every,
    )
    slices = read_slices(options)
    per_subject = options.slices_per_subject or (1 if options.data == "builtin" else None)
    splits = {seed: draw_split(slices, options.labelled, per_subject, seed) for seed in options.seeds}
    open_folder(options, settings)
    everything = []
    for seed, split in splits.items():
        folder = options.out / f"seed{seed}"
        remember_split(folder, split.ids(slices))
        arms = Arms(slices, split, settings, seed, folder, options.device)
        everything.append(arms)
        arms.train(options.stage)
        if rank() > 0:
            continue
        if options.stage == "all":
            arms.probe()
        arms.evaluate(options.final)
        closing = write_report(options, settings, slices, everything)  # after every seed: a kill loses none of them
    if rank() == 0:
        print(closing)


def read_slices(options: argparse.Namespace) -> Slices:
    """The data set that --data names."""
    if options.data == "builtin":
        from examples.data.virtual_subjects import virtual_subjects

        return virtual_subjects(options.out / "data" / "virtual_subjects.npz")
    from examples.data.folders import read_folder

    size = tuple(options.size) if options.size else None
    return read_folder(Path(options.data), size, options.spacing)


def open_folder(options: argparse.Namespace, settings: Settings) -> None:
    """Refuses to write over an earlier run without --resume, or to go on with one that had other settings."""
    started = {
        "data": options.data if options.data == "builtin" else Path(options.data).name,
        "labelled": options.labelled,
        "slices_per_subject": options.slices_per_subject,
        "size": options.size,
        "spacing": options.spacing,
        **dataclasses.asdict(settings),
    }
    started = {name: list(value) if isinstance(value, tuple) else value for name, value in started.items()}
    path = options.out / "run.json"
    if not path.is_file():
        write_json(path, started)
        return
    before = read_json(path)
    changed = sorted(name for name in before.keys() | started.keys() if before.get(name) != started.get(name))
    if changed:
        name = changed[0]
        raise DataError(f"{path}: was started with {name} = {before.get(name)}, now {started.get(name)}")
    folders = [
        options.out / f"seed{seed}" / (f"stage{options.stage}" if options.stage != "all" else "")
        for seed in options.seeds
    ]
    if not options.resume and rank() == 0 and any(folder.exists() for folder in folders):
        raise DataError(f"{options.out}: already holds a run; go on with --resume or choose another --out")


def remember_split(folder: Path, ids: dict[str, list[str]]) -> None:
    """Writes the split of a seed, or checks that it is still the one this run was started with."""
    path = folder / "split.json"
    if path.is_file():
        if read_json(path) != ids:
            raise DataError(f"{path}: the data has changed since this run was started")
    else:
        write_json(path, ids)


if __name__ == "__main__":
    sys.exit(main())
