"""Three-stage contrastive segmentation with few labels, beside its supervised baselines.

    python -m examples.three_stage --data builtin --out demo                       # about 5 minutes on two cores
    python -m examples.three_stage --data Task04_Hippocampus --labelled 4 --iterations 1000 2000 6000 --out hippocampus
    python -m examples.three_stage --data Task04_Hippocampus --volumes --patch 48 48 48 --labelled 4 --out hippocampus3d

Stage 1 pre-trains the encoder with IHPC on unlabelled slices, stage 2 encoder and decoder with region PHPC on the
labelled ones, stage 3 segments with a mean teacher. `--stage all` also trains a supervised baseline at equal iterations
and linear heads on frozen bodies, with --equal-seconds also a supervised baseline at equal seconds. A killed run goes
on with --resume. Several processes share the work under `torchrun --nproc-per-node 2 -m examples.three_stage ...`.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from pathlib import Path

import torch
from torch.distributed import is_torchelastic_launched

from examples.arms import Arms
from examples.data.slices import PARTS, DataError, Slices
from examples.data.splits import Split, apply_split_file, draw_slices, draw_split, first_split
from examples.files import read_json, write_json
from examples.networks import SMALLEST, STRIDE
from examples.report import write_report
from examples.settings import VOLUME_BATCHES, Settings
from examples.training import quiet, rank

CORES = torch.get_num_threads()  # what PyTorch would use


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = parse(argv)
    quiet()
    leave_a_core()
    try:
        run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"stopped; go on with --resume --out {options.out}", file=sys.stderr)
        return 130
    return 0


def leave_a_core() -> None:
    """Computes with one thread fewer than there are cores, unless OMP_NUM_THREADS says how many.

    Threads wait for each other in every operation: where another process holds a core, as many threads as cores are
    several times slower than one fewer.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, CORES - 1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.three_stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="builtin", help='"builtin" or a folder: MSD, nnU-Net, ACDC, LA, .h5, images with masks')
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labelled", type=int, metavar="N", help="labelled training subjects (default 2)")
    labels.add_argument(
        "--labelled-first", type=int, metavar="N", help="the first N training subjects of a folder's list"
    )
    labels.add_argument("--labelled-slices", type=int, metavar="K", help="labelled slices in all, of many subjects")
    add("--slices-per-subject", type=int, metavar="K", help="labelled slices of each (default: builtin 1, folders all)")
    add("--split", type=Path, metavar="FILE.json", help="train, val, test and labelled as lists of ids or subjects")
    add("--out", type=Path, required=True, help="where checkpoints, results and figures go")
    add("--stage", choices=("all", "1", "2", "3"), default="all", help="one stage alone, without the baselines")
    add("--equal-seconds", action="store_true", help="also train supervised for the seconds of the three stages")
    add("--resume", action="store_true", help="go on in --out from the last checkpoint")
    add("--seed", type=int, default=0, help="seed of the labelled draw, the weights and the batches")
    add("--seeds", type=int, nargs="+", metavar="S", help="several seeds: mean, sd and paired differences")
    add("--device", choices=("cpu", "cuda", "auto"), default="auto")
    add("--devices", type=int, help="processes or GPUs, data-parallel (default 1, under torchrun all of its processes)")
    add("--final", action="store_true", help="also read the test subjects (do this once, with settings fixed)")
    add("--iterations", type=int, nargs=3, default=defaults.iterations, metavar=("S1", "S2", "S3"))
    add("--checkpoint-every", type=int, default=defaults.checkpoint_every, metavar="STEPS", help="default %(default)s")
    add("--crop", type=int, nargs=2, default=defaults.crop, metavar=("X", "Y"), help="training crops, in pixels")
    add("--size", type=int, nargs=2, metavar=("X", "Y"), help="folders: crop or pad slices to this (multiples of 16)")
    add("--spacing", type=float, metavar="MM", help="folders: in-plane pixel size to resample to")
    add("--subject", metavar="PATTERN", help="folders: what this matches first in a case's name is its subject")
    add("--volumes", action="store_true", help="train on 3-D patches and evaluate by a sliding window")
    add("--patch", type=int, nargs=3, metavar=("X", "Y", "Z"), help="the patch of --volumes (default 48 48 48)")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or [options.seed]
    if options.labelled is options.labelled_first is options.labelled_slices is None:
        options.labelled = 2
    if options.labelled_first is not None and (options.data == "builtin" or options.slices_per_subject is not None):
        parser.error(
            "--labelled-first takes whole subjects of a folder; it cannot go with builtin, --slices-per-subject"
        )
    by_slice = {"--size": options.size, "--slices-per-subject": options.slices_per_subject}
    by_slice |= {"--labelled-slices": options.labelled_slices}
    if options.volumes and (named := [name for name, value in by_slice.items() if value is not None]):
        parser.error(f"{named[0]} is about slices; it cannot go with --volumes")
    if options.patch and not options.volumes:
        parser.error("--patch is that of --volumes")
    if options.labelled_slices is not None and options.slices_per_subject is not None:
        parser.error("--slices-per-subject cannot go with --labelled-slices, which counts all of them")
    if options.volumes:
        options.patch = options.crop = options.patch or [48, 48, 48]
    started = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else None
    if options.devices is None:
        options.devices = started or 1
    if started not in (None, options.devices):
        parser.error(f"--devices {options.devices}: torchrun has started {started} processes")
    counts = [*options.iterations, options.devices, options.checkpoint_every, options.slices_per_subject or 1]
    if min(counts) < 1 or options.slices_per_subject == 0:
        parser.error("--iterations, --devices, --checkpoint-every and --slices-per-subject must be at least 1")
    if any(side < SMALLEST or side % STRIDE for side in (*options.crop, *(options.size or ()))):
        parser.error(f"--crop, --size and --patch must be multiples of {STRIDE}, at least {SMALLEST}")
    check_reading(parser, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
        parser.error("--seeds must be different numbers from 0")
    return options


def check_reading(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command line where --spacing or --subject cannot be used."""
    if options.spacing is not None and not 0 < options.spacing < math.inf:
        parser.error(f"--spacing {options.spacing:g}: must be above 0")
    try:
        re.compile(options.subject or "")
    except re.error as error:
        parser.error(f"--subject {options.subject}: is no regular expression ({error})")


def run(options: argparse.Namespace) -> None:
    """Reads the data, trains what is asked for, writes the results and the report."""
    settings = Settings(
        iterations=tuple(options.iterations),
        crop=tuple(options.crop),
        devices=options.devices,
        checkpoint_every=options.checkpoint_every,
        **(VOLUME_BATCHES if options.volumes else {}),
    )
    slices, labelled = read_data(options), None
    if options.split is not None:
        slices, labelled = apply_split_file(slices, options.split)
        options.labelled = options.labelled if labelled is None else None
    splits = {seed: choose_split(options, slices, labelled, seed) for seed in options.seeds}
    open_folder(options, settings)
    if rank() == 0:
        print(describe(slices), flush=True)
    everything = []
    for seed, split in splits.items():
        folder = options.out / f"seed{seed}"
        remember_split(folder, split.ids(slices))
        arms = Arms(slices, split, settings, seed, folder, options.device)
        everything.append(arms)
        arms.train(options.stage, options.equal_seconds)
        if rank() > 0:
            continue
        if options.stage == "all":
            arms.probe()
        arms.evaluate(options.final)
        closing = write_report(options, settings, slices, everything)  # after every seed: a kill loses none of them
    if rank() == 0:
        print(closing)


def read_data(options: argparse.Namespace) -> Slices:
    """The data set that --data names, as slices or as volumes."""
    patch = tuple(options.patch) if options.volumes else None
    if options.data == "builtin":
        from examples.data.virtual_subjects import virtual_subjects, virtual_volumes

        return virtual_volumes(patch) if patch else virtual_subjects(options.out / "data" / "virtual_subjects.npz")
    from examples.data.folders import read_folder, read_volumes

    folder, size = Path(options.data), tuple(options.size) if options.size else None
    more = options.spacing, options.subject
    return read_volumes(folder, patch, *more) if patch else read_folder(folder, size, *more)


def choose_split(options: argparse.Namespace, slices: Slices, labelled: list[int] | None, seed: int) -> Split:
    """The split of one seed: `labelled` where a split file fixes it, else drawn."""
    if labelled is not None:
        return Split(labelled, *(slices.of_part(part) for part in PARTS))
    if options.labelled_first is not None:
        return first_split(slices, options.labelled_first)
    if options.labelled_slices is not None:
        return draw_slices(slices, options.labelled_slices, seed)
    per_subject = options.slices_per_subject or (1 if options.data == "builtin" and not options.volumes else None)
    return draw_split(slices, options.labelled, per_subject, seed)


def describe(slices: Slices) -> str:
    """One line: the layout that was recognised and what it holds."""
    counts = f"{len(slices)} {slices.noun} of {len(set(slices.subjects))} subjects"
    text = f"data: {slices.source['layout']}, {counts}; classes: {', '.join(slices.classes)}"
    values = slices.source.get("label_values", [])
    if values != list(range(len(values))):
        text += f" (label values {', '.join(map(str, values))} became 0 to {len(values) - 1})"
    if grey := slices.source.get("grey_to_rgb"):
        text += f"; {grey} grey pictures became RGB like the other {slices.source['cases'] - grey}"
    if outside := slices.source.get("foreground_outside"):
        size = " x ".join(map(str, slices.size))
        text += f"; {100 * outside:.1f} % of the foreground lies outside of {size} and does not count (--size)"
    return text


def open_folder(options: argparse.Namespace, settings: Settings) -> None:
    """Refuses to write over an earlier run without --resume, or to go on with one that had other settings."""
    started = {
        "data": options.data if options.data == "builtin" else Path(options.data).name,
        "labelled": options.labelled,
        "labelled_slices": options.labelled_slices,
        "labelled_first": options.labelled_first,
        "slices_per_subject": options.slices_per_subject,
        "split": options.split and options.split.name,
        "patch": options.patch,
        "size": options.size,
        "spacing": options.spacing,
        "subject": options.subject,
        **dataclasses.asdict(settings),
    }
    started = {name: list(value) if isinstance(value, tuple) else value for name, value in started.items()}
    path = options.out / "run.json"
    if not path.is_file():
        if rank() == 0:
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
    elif rank() == 0:
        write_json(path, ids)


if __name__ == "__main__":
    sys.exit(main())
