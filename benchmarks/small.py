"""A small step beside its competitors in one process, in turns: how many times longer or shorter it takes.

    python benchmarks/small.py supcon 64        # rows; of ntxent, infonce, clip, hard_negative_nce, ihpc and pccs too
    python benchmarks/small.py region_phpc 16   # the side of one square region in pixels
    python benchmarks/small.py regions 64       # of 128 pixels each, or 256 of 64

Correct first; then a turn is many steps where a step is short, and a figure the median over many turns.
`bench_small.py` takes the median over fresh processes on top.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fresh
import peers
import torch
from cases import CASES, Case
from measure import MAX_GIGABYTES, assert_close, assert_same_as, clock
from torch import Tensor

# Every competitor of a loss: its eager form first, then the libraries that have it.
VECTORS = {
    "supcon": ["eager_supcon", "pml_supcon"],
    "ntxent": ["eager_ntxent", "lightly_ntxent", "monai_contrastive", "pml_ntxent"],
    "infonce": ["eager_infonce", "linear_cross_entropy", "info_nce_pytorch"],
    "clip": ["eager_clip"],
    "hard_negative_nce": ["eager_hard_negative_nce"],
    "ihpc": ["eager_ihpc"],
    "pccs": ["eager_pccs"],
}
# Regions of a map by their number: 64 of 2 x 8 x 8 pixels, 256 of 8 x 8.
REGIONS = {
    64: {"batch": 2, "height": 64, "width": 64, "region_size": 8},
    256: {"batch": 1, "height": 128, "width": 128, "region_size": 8},
}
WHOLE = 1024  # rows up to which the dense float64 form is compared with the whole step
WARM_SECONDS = 2e-2
TURN_SECONDS = 2e-3  # of each competitor: some times what a switch between them costs
SECONDS = 0.4  # of the timing, for each competitor
LONGEST_STEP = 2.0  # of who takes turns
FEWEST, MOST = 3, 200  # turns, steps that warm up


Figures = dict[str, float]  # by method


class Problem(NamedTuple):
    """A case of ours, its competitors on the same inputs, and the shape of these."""

    case: str
    others: list[str]
    shape: dict[str, int]


def problem(loss: str, size: int) -> Problem:
    """By name: rows of a loss of vectors, the side of a region, or the number of regions."""
    if loss == "regions":
        return Problem("published_phpc", ["block_loop"], REGIONS[size])
    if loss == "region_phpc":
        return Problem(loss, ["eager_phpc"], {"batch": 1, "height": size, "width": size})
    return Problem(loss, VECTORS[loss], {"count": size})


def _assert_right(name: str, case: Case, shape: dict[str, int]) -> None:
    """The dense float64 form agrees, of a large step on a small one."""
    if case.leaves[0].numel() > WHOLE * 128:
        case = CASES[name](**{key: min(value, fresh.SMALL.get(key, value)) for key, value in shape.items()})
    assert_same_as(case)


def _repeats(step: Callable[[], object]) -> int:
    """How many steps fill a turn, after enough of them to be warm."""
    steps, seconds = 0, 0.0
    while seconds < WARM_SECONDS and steps < MOST:
        start = clock()
        step()
        seconds, steps = seconds + clock() - start, steps + 1
    return max(1, round(TURN_SECONDS * steps / seconds))


def in_turns(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each, for every turn. The order turns too: nobody always comes behind the same other."""
    repeats = {name: _repeats(step) for name, step in steps.items()}
    names, taken, spent = list(steps), {name: [] for name in steps}, 0.0
    while len(taken[names[0]]) < FEWEST or (spent < seconds and len(taken[names[0]]) < MOST):
        shift = len(taken[names[0]]) % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            for _ in range(repeats[name]):
                steps[name]()
            spent += (turn := clock() - start)
            taken[name].append(turn / repeats[name])
    return taken


def _first(name: str, shape: dict[str, int], ours: Case, value: Tensor) -> tuple[Case, float] | None:
    """A competitor and the seconds of its first step, which must equal ours; None where it needs too much memory."""
    other = CASES[name](**shape)
    start = clock()
    try:
        with fresh.limited(MAX_GIGABYTES):
            found = other.step()
    except (RuntimeError, MemoryError) as error:
        if fresh.is_out_of_memory(error):
            return None
        raise
    seconds = clock() - start
    assert_close(f"loss of {name}", found, value)
    for leaf, own in zip(other.leaves, ours.leaves, strict=True):
        assert_close(f"gradient of {name}", leaf.grad, own.grad)
    return other, seconds


def compare(case: str, others: list[str], shape: dict[str, int], seconds: float = SECONDS) -> dict[str, Figures]:
    """Median "seconds" of a step and of each other, and the median over turns of ours over each: "ratios".

    Correct first: ours equals the dense float64 form, and every other one ours on this very input. One that has no
    memory for it has no figures; one that takes far too long for turns has those of its only step.
    """
    ours = CASES[case](**shape)
    _assert_right(case, ours, shape)
    value, steps, once = ours.step(), {case: ours.step}, {}
    for name in others:
        if first := _first(name, shape, ours, value):
            if first[1] > LONGEST_STEP:
                once[name] = first[1]
            else:
                steps[name] = first[0].step
    taken = in_turns(steps, seconds * len(steps))
    taken |= {name: [step] * len(taken[case]) for name, step in once.items()}
    return {
        "seconds": {name: statistics.median(of_steps) for name, of_steps in taken.items()},
        "ratios": {
            name: statistics.median(own / other for own, other in zip(taken[case], of_steps, strict=True))
            for name, of_steps in taken.items()
            if name != case
        },
    }


def measure(case: str, others: list[str], shape: dict[str, int], processes: int = 3) -> dict[str, Figures]:
    """The same as medians over fresh processes: where a process's memory happens to lie moves all of its figures."""
    request = json.dumps({"case": case, "others": others, "shape": shape})
    found = [fresh.run(Path(__file__), request, timeout=300) for _ in range(processes)]
    return {
        kind: {name: statistics.median(one[kind][name] for one in found) for name in found[0][kind]}
        for kind in ("seconds", "ratios")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", choices=[*VECTORS, "region_phpc", "regions"])
    parser.add_argument("size", type=int)
    parser.add_argument("--processes", type=int, default=1, help="the median over so many fresh ones")
    options = parser.parse_args()
    case, others, shape = problem(options.loss, options.size)
    there = [name for name in others if not peers.why_not(name)]
    found = measure(case, there, shape, options.processes)
    print(f"{case} {options.size}: {found['seconds'][case] * 1e6:.0f} us")
    for name, ratio in found["ratios"].items():
        print(f"  {ratio:.3g} times {name}, {found['seconds'][name] * 1e6:.0f} us")
    for name in others:
        if name not in found["ratios"]:
            print(f"  {name}: {peers.why_not(name) or f'more than {MAX_GIGABYTES:g} GB'}")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        torch.set_num_threads(1)
        print(json.dumps(compare(**json.loads(sys.argv[1]))))
    else:
        main()
