"""The comparison: every semi-supervised method on the same data, labelled cases, network and budget, paired by seed.

    python -m examples.compare --data builtin --out comparison --tune --jobs 2            # every arm's choices, once
    python -m examples.compare --data builtin --out comparison --seeds 8 --jobs 2         # every arm, validation
    python -m examples.compare --data builtin --out comparison --seeds 8 --resume --final # the test volumes
    python -m examples.compare --quick --out quick                                        # a few minutes

Every arm of a seed has the same labelled cases and the same number of second-stage iterations; `recipes.py` holds the
arms. Choices are made on validation; --final reads test and refuses to do so twice. A killed run goes on with --resume.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from examples.compare_report import write_report
from examples.data.slices import DataError, Slices
from examples.data.splits import Split, draw_slices, draw_split, first_split
from examples.files import read_json, write_json
from examples.networks import SMALLEST, STRIDE
from examples.recipes import QUICK, SETTINGS, Choice, Iterations, Step, arms, studies
from examples.three_stage import check_reading, describe
from examples.training import quiet
from examples.trials import Trial

TUNING_SEEDS = (1000,)  # no seed of the comparison
DEFAULT: Choice = {"lr": SETTINGS.scratch_lr}
CHOICES = "choices.json"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = parse(argv)
    quiet()
    read_data.cache_clear()
    try:
        tune(options) if options.tune else compare(options)
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
    compared, asked = list(arms(Iterations(), 2)), list(studies(Iterations(), 2))
    known = compared + asked
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="builtin", help='"builtin" (scanners) or a folder that examples.three_stage reads')
    add(
        "--methods", nargs="+", choices=known, default=compared, metavar="ARM",
        help=f"default: {', '.join(compared)}. Only when named: {', '.join(asked)}",
    )  # fmt: skip
    add("--seeds", type=int, help="compare over seeds 0 ... N - 1 (default 8, quick 2)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labelled-cases", type=int, nargs="+", metavar="N", help="whole labelled subjects")
    labels.add_argument(
        "--labelled-first", type=int, nargs="+", metavar="N", help="the first subjects of a folder's list"
    )
    labels.add_argument("--labelled-slices", type=int, nargs="+", metavar="K", help="one slice each of K (default 3)")
    add("--out", type=Path, required=True, help="where checkpoints, results and figures go")
    add("--resume", action="store_true", help="go on in --out from the last checkpoints")
    add("--tune", action="store_true", help="choose each arm's learning rate and weight on validation, once")
    add("--final", action="store_true", help="also read the test volumes: once, with every choice made")
    add("--quick", action="store_true", help="few iterations, to see that everything runs")
    add("--jobs", type=int, default=1, help="arms trained at the same time, one thread each")
    add("--iterations", type=int, nargs=5, metavar=tuple(vars(Iterations())), help="in place of the built-in ones")
    add("--checkpoint-every", type=int, default=SETTINGS.checkpoint_every, metavar="STEPS", help="default %(default)s")
    add("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    add("--crop", type=int, nargs=2, default=SETTINGS.crop, metavar=("H", "W"), help="training crops, in pixels")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="folders: crop or pad slices to this (multiples of 16)")
    add("--spacing", type=float, metavar="MM", help="folders: in-plane pixel size to resample to")
    add("--subject", metavar="PATTERN", help="folders: what this matches first in a case's name is its subject")
    options = parser.parse_args(argv)
    if options.seeds is None:
        options.seeds = 2 if options.quick else 8
    given_labels = options.labelled_cases or options.labelled_first or options.labelled_slices
    counts = [*(given_labels or ()), *(options.iterations or ())]
    if min(options.seeds, options.jobs, options.checkpoint_every, *counts) < 1:
        parser.error("--seeds, --jobs, --iterations, --checkpoint-every and the numbers of labels must be at least 1")
    if any(side < SMALLEST or side % STRIDE for side in (*options.crop, *(options.size or ()))):
        parser.error(f"--crop and --size must be multiples of {STRIDE}, at least {SMALLEST}")
    check_reading(parser, options)
    options.methods = [name for name in known if name in options.methods]  # in the order of dependence
    if "supervised-seconds" in options.methods and "mean-teacher" not in options.methods:
        parser.error("supervised-seconds is measured by mean-teacher; name it too")
    kind = "cases" if options.labelled_cases else "first" if options.labelled_first else "slices"
    options.labels = {f"{kind}{n}": (kind, n) for n in given_labels or (3,)}
    if kind == "first" and options.data == "builtin":
        parser.error("--labelled-first: the built-in subjects have no order; use --labelled-cases")
    given = Iterations(*options.iterations) if options.iterations else Iterations()
    options.iterations = QUICK if options.quick else given
    if options.iterations.warm <= options.iterations.images + options.iterations.pixels:
        parser.error(f"--iterations: pre-training is part of the warm start, got {options.iterations}")
    options.settings = dataclasses.replace(
        SETTINGS, crop=tuple(options.crop), checkpoint_every=options.checkpoint_every
    )
    return options


def compare(options: argparse.Namespace) -> None:
    """Trains every arm on every seed and label count, then measures and reports."""
    final = options.out / "test.json"
    if options.final and final.is_file():
        raise DataError(f"{final}: the test volumes have been read; a second look would be a choice made on them")
    chosen = choices(options)
    open_folder(options, chosen)
    slices = read_slices(options)
    print(describe(slices), flush=True)
    labels, seeds = options.labels, range(options.seeds)
    # Arm by arm: a run that is stopped has compared its first arms over all seeds.
    recipes = recipes_of(options, slices)
    for measured in (False, True):  # those measured by the seconds of others come after them
        methods = [name for name in options.methods if (recipes[name].seconds_of is not None) == measured]
        work_through([(options, *job, chosen[job[2]]) for job in product_of(labels, seeds, methods)])
    trials = {(label, seed): open_trial(options, slices, label, seed) for label in labels for seed in seeds}
    # Arms that earlier calls have trained in every trial are reported too.
    chosen = {
        name: choice for name, choice in read_json(options.out / "run.json")["choices"].items() if name in recipes
    }
    options.methods = [
        name for name in recipes if name in chosen and all(trial.has_scores(name) for trial in trials.values())
    ]
    chosen = {name: chosen[name] for name in options.methods}
    if options.final:
        tables = {
            f"{label}/seed{seed}": {arm: trial.scores(arm, "test") for arm in options.methods}
            for (label, seed), trial in trials.items()
        }
        write_json(final, tables)
    print(write_report(options, slices, trials, chosen))


def tune(options: argparse.Namespace) -> None:
    """Trains each arm with every choice on the tuning seeds and keeps the best by Dice on validation.

    Arms that add to another one come after it, and take over what was chosen for it.
    """
    path = options.out / CHOICES
    kept = read_choices(options)
    slices = read_slices(options)
    print(describe(slices), flush=True)
    recipes = recipes_of(options, slices)
    asked = [name for name in options.methods if recipes[name].seconds_of is recipes[name].chosen_as is None]
    if done := [name for name in asked if name in kept]:
        raise DataError(f"{path}: {done[0]} has been tuned; remove its entry to choose again")
    for name in asked:
        base = recipes[name].base
        if base is not None and base not in (*asked, *kept):
            raise DataError(f"{path}: {name} adds to {base}, which has not been tuned; name it too")
    for arms_ in ([n for n in asked if not recipes[n].base], [n for n in asked if recipes[n].base]):
        tune_arms(options, slices, arms_, kept)


def tune_arms(options: argparse.Namespace, slices: Slices, names: list[str], kept: dict[str, dict]) -> None:
    """Trains these arms with every choice, and writes the best to `kept` and to the file of choices."""
    recipes, label = recipes_of(options, slices), next(iter(options.labels))
    tries = {}
    for name in names:
        base = recipes[name].base
        of_base = {key: value for key, value in kept[base]["chosen"].items() if key != "lr"} if base else {}
        tries[name] = [choice | of_base for choice in recipes[name].choices]
    jobs = product_of([label], TUNING_SEEDS, names)
    work_through([(options, *job, choice) for job in jobs for choice in tries[job[2]]])
    trials = [open_trial(options, slices, label, seed) for seed in TUNING_SEEDS]
    for name in names:
        tried = []
        for choice in tries[name]:
            dice = [trial.scores(tuning_name(name, choice), "val")["dice"]["all"]["mean"] for trial in trials]
            tried.append({**choice, "validation_dice": round(sum(dice) / len(dice), 3)})
        best = max(range(len(tried)), key=lambda number: tried[number]["validation_dice"])
        kept[name] = {"labels": label, "chosen": tries[name][best], "tried": tried}
        shown = "  ".join(f"{one['validation_dice']:.2f}" for one in tried)
        print(f"{name:28s} {text_of(kept[name]['chosen']):44s} {shown}")
        write_json(options.out / CHOICES, {"seeds": TUNING_SEEDS, "settings": settings_of(options), "arms": kept})


def read_choices(options: argparse.Namespace) -> dict[str, dict]:
    """What --tune has found so far, {} before. Raises DataError where it was tuned with other settings."""
    path = options.out / CHOICES
    if not path.is_file():
        return {}
    content = read_json(path)
    check_same(path, content["settings"], settings_of(options), "tuned")
    return content["arms"]


def check_same(path: Path, before: dict, now: dict, verb: str) -> None:
    """Raises DataError where a setting was another one."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise DataError(f"{path}: was {verb} with {name} = {before.get(name)}, now {now.get(name)}")


def text_of(choice: Choice) -> str:
    """ "lr 0.01, weight 0.1"."""
    return ", ".join(f"{name} {value:g}" for name, value in choice.items())


def tuning_name(arm: str, choice: Choice) -> str:
    """The folder of an arm in tuning: one for each choice."""
    return f"{arm}@" + "-".join(f"{name}{value:g}" for name, value in choice.items())


def choices(options: argparse.Namespace) -> dict[str, Choice]:
    """What each arm's last step is trained with: what --tune chose, or before it the default learning rate.

    Raises DataError where some arms were tuned and others not.
    """
    tuned = read_choices(options)
    found = {}
    for name, step in (arms(options.iterations, 2) | studies(options.iterations, 2)).items():
        if name in options.methods:
            same = "supervised" if step.seconds_of is not None else step.chosen_as or name  # as that arm
            if tuned and same not in tuned:
                raise DataError(f"{options.out / CHOICES}: {same} has not been tuned and other arms have; tune it too")
            found[name] = tuned[same]["chosen"] if tuned else DEFAULT
    return found


def recipes_of(options: argparse.Namespace, slices: Slices) -> dict[str, Step]:
    """Every arm by name."""
    classes = len(slices.classes)
    return arms(options.iterations, classes) | studies(options.iterations, classes)


def product_of(labels: Iterable[str], seeds: Iterable[int], arms: Iterable[str]) -> list[tuple[str, int, str]]:
    """Every (label, seed, arm), the arms in their order."""
    return [(label, seed, arm) for label in labels for arm in arms for seed in seeds]


def work_through(jobs: list[tuple]) -> None:
    """Trains the jobs, in processes of their own where --jobs asks for several; they wait for steps that they share."""
    processes = min(jobs[0][0].jobs, len(jobs)) if jobs else 0
    if processes <= 1:
        for job in jobs:
            train_arm(*job)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        futures = [pool.submit(train_arm, *job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or a failure would be told after all the others have been trained
            raise


def one_thread() -> None:
    """At the start of a worker process, which is not to outlive the run: a killed one would leave it waiting."""
    threading.Thread(target=end_with_the_run, daemon=True).start()
    torch.set_num_threads(1)
    quiet()


def end_with_the_run() -> None:
    """Waits for the process that started this one to end, then ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_arm(options: argparse.Namespace, label: str, seed: int, arm: str, choice: Choice) -> None:
    """Trains and measures one arm of one seed; in tuning an arm has several choices and as many folders."""
    trial = open_trial(options, read_slices(options), label, seed)
    name = tuning_name(arm, choice) if options.tune else arm
    trial.train(arm, choice, name)
    dice = trial.scores(name, "val")["dice"]["all"]["mean"]
    print(f"{label}  seed {seed}  {name:28s} Dice on validation {dice or 0:5.2f}", flush=True)


def open_trial(options: argparse.Namespace, slices: Slices, label: str, seed: int) -> Trial:
    """The trial of one seed with one number of labels."""
    recipes = recipes_of(options, slices)
    folder = options.out / ("tuning" if options.tune else label) / f"seed{seed}"
    return Trial(
        slices, split_of(options, slices, label, seed), options.settings, recipes, seed, folder, options.device
    )


def split_of(options: argparse.Namespace, slices: Slices, label: str, seed: int) -> Split:
    """The split of one seed: a function of the data, the number of labels and the seed alone."""
    kind, count = options.labels[label]
    if options.data == "builtin":
        from examples.data.scanners import draw_scanner_split

        return draw_scanner_split(slices, count, 1 if kind == "slices" else None, seed)
    if kind == "first":
        return first_split(slices, count)
    return draw_slices(slices, count, seed) if kind == "slices" else draw_split(slices, count, None, seed)


def read_slices(options: argparse.Namespace) -> Slices:
    """The data set that --data names. A process reads it once for all of its arms."""
    size = tuple(options.size) if options.size else None
    return read_data(options.data, options.out / "data" / "scanners.npz", size, options.spacing, options.subject)


@functools.lru_cache(maxsize=1)
def read_data(
    data: str, cache: Path, size: tuple[int, int] | None, spacing: float | None, subject: str | None
) -> Slices:
    """`read_slices`; the built-in data is kept in the file `cache`."""
    if data == "builtin":
        from examples.data.scanners import scanners

        return scanners(cache)
    from examples.data.folders import read_folder

    return read_folder(Path(data), size, spacing, subject)


def settings_of(options: argparse.Namespace) -> dict:
    """All that a run of the same arms must have in common."""
    return {
        "data": options.data if options.data == "builtin" else Path(options.data).name,
        "size": options.size,
        "spacing": options.spacing,
        "subject": options.subject,
        **{f"iterations of {name}": count for name, count in dataclasses.asdict(options.iterations).items()},
        **{name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(options.settings).items()},
    }


def open_folder(options: argparse.Namespace, chosen: dict[str, Choice]) -> None:
    """Refuses to go on with a run that had other settings, or without --resume."""
    path, started = options.out / "run.json", settings_of(options)
    if not path.is_file():
        write_json(path, started | {"choices": chosen})
        return
    if not options.resume:
        raise DataError(f"{options.out}: already holds a run; go on with --resume or choose another --out")
    before = read_json(path)
    before_chosen = before.pop("choices")
    now = started | {f"the choice of {name}": choice for name, choice in chosen.items()}
    before |= {f"the choice of {name}": before_chosen.get(name, choice) for name, choice in chosen.items()}
    check_same(path, before, now, "started")
    write_json(path, started | {"choices": before_chosen | chosen})


if __name__ == "__main__":
    sys.exit(main())
