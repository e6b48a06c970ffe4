"""`hpcloss.compat.pml` with the pairs of miners, beside pytorch-metric-learning: time in turns, memory in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fresh
import peers
import pytest
import torch
from measure import Bar, in_turns
from torch import Tensor

import hpcloss
from hpcloss.compat import pml

ROUNDS = 21
WITHIN = 1e-4  # relative, of value and gradient: sums of this many fp32 numbers, each in an order of its own
MINERS = {
    "all": None,
    "multi_similarity": lambda miners: miners.MultiSimilarityMiner(),
    "semihard": lambda miners: miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard"),
    "batch_hard": lambda miners: miners.BatchHardMiner(),
}
# The library's NTXentLoss compares each positive pair with each negative one: where that is too much it has no figure.
MOST = 1.5e8
SIZES = ["128", "1024", "128x4096"]


def step_of(name: str, miner: str, size: str, theirs: bool) -> tuple[Callable[[], Tensor], Tensor] | None:
    """A forward and backward pass and the embeddings; None where the library has no figure."""
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

    generator = torch.Generator().manual_seed(0)
    count, *memory = map(int, size.split("x"))
    centres = torch.randn(16 if count + sum(memory) <= 128 else 64, 128, generator=generator)

    def drawn(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(number) % len(centres)
        return centres[labels] / 2 + torch.randn(number, 128, generator=generator), labels

    x, labels = drawn(count)
    others = [part for number in memory for part in drawn(number)]
    build = MINERS[miner]
    if build is None:
        indices = get_all_pairs_indices(labels, *others[1:])
    else:
        indices = build(miners)(x, labels, *others)
    if theirs and name == "NTXentLoss" and len(indices[0]) * len(indices[-1]) > MOST:
        return None
    loss = getattr(losses if theirs else pml, name)()
    x.requires_grad_()

    def step() -> Tensor:
        x.grad = None
        value = loss(x, labels, indices, *others)
        value.backward()
        return value.detach()

    return step, x


def peak(*arguments: object) -> float:
    """Megabytes of memory that a second step takes in a process of its own."""
    package = str(Path(hpcloss.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.splitlines()[-1])


def main(request: str) -> float:
    torch.set_num_threads(1)
    found = step_of(*json.loads(request))
    assert found is not None
    step, x = found
    step()
    x.grad = None
    fresh._return_free_memory()
    can_forget = fresh._forget_peak()
    before = fresh._status("VmRSS") if can_forget else fresh._largest_resident()
    step()
    after = fresh._status("VmHWM") if can_forget else fresh._largest_resident()
    assert before is not None and after is not None
    return (after - before) / fresh.MEGABYTE


@pytest.mark.benchmark(group="pairs of miners")
@pytest.mark.skipif(bool(peers.why_not("pml_supcon")), reason=str(peers.why_not("pml_supcon")))
@pytest.mark.parametrize("size", [pytest.param(size, marks=[pytest.mark.slow] * (size != "128")) for size in SIZES])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def bench_pairs_of_miners(benchmark, report, name, miner, size):
    ours, theirs = [step_of(name, miner, size, library) for library in (False, True)]
    assert ours is not None
    if theirs is None:
        seconds, _ = in_turns(benchmark, ours[0], {}, ROUNDS)
        report(seconds, peak_mb=peak(name, miner, size, False), note="too many pairs for the library")
        return
    values = [step() for step, _ in (ours, theirs)]
    assert abs(values[0] - values[1]) <= WITHIN * abs(values[1])
    gradient = theirs[1].grad
    assert (ours[1].grad - gradient).norm() <= WITHIN * gradient.norm()
    seconds, ratios = in_turns(benchmark, ours[0], {"library": theirs[0]}, ROUNDS)
    megabytes = [peak(name, miner, size, library) for library in (False, True)]
    bars = [
        Bar("ours_over_library", 1 / ratios["library"], 1.2),
        Bar("memory_over_library", megabytes[0] / megabytes[1], 1.5),
    ]
    report(seconds, bars, peak_mb=megabytes[0], library_peak_mb=megabytes[1])


if __name__ == "__main__":
    print(main(sys.argv[1]))
