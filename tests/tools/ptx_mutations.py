"""How many systematic mistakes in compiled kernels the PTX interpreter notices: `python -m tests.tools.ptx_mutations`.

The kernels over tiles of three losses run as compiled; what each launch was given is kept. Then each kernel runs
again from the same arguments with one mistake in its PTX. It is noticed by a fault, by a hazard that was not there, or
by a value: a result of a forward kernel off by more than 1e-3, of a backward kernel by more than 1e-3 of the largest.
That is about what `test_ptx.test_losses` sees, because an error of a log-sum is a relative error of the gradient.
Else the result is "near", or the "same" to the last bit: then the mistake is none, or these inputs do not reach it.

On 2026-11-30 (Triton 3.9, two of a kind): 307 of 358 noticed, 5 near, 46 the same. Fewer than LEAST of all fail.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.compiled import test_ptx
from tests.tools.ptx import Fault, Kernel
from tests.tools.ptx.backend import Machine
from tests.tools.ptx.mistakes import KINDS, Mistake, mistakes

# The capability and loss of the kernels.
SOURCES = ((90, "region"), (80, "region"), (80, "supcon"))
TOLERANCE, LEAST = 1e-3, 0.8
WAYS = ("fault", "hazard", "value", "near", "same")  # the last two are not noticed


class Launch:
    """A kernel as it was launched, and what it made."""

    def __init__(self, ptx: str, shared: int, programs: int, given: list[Any], names: list[str]) -> None:
        self.ptx, self.shared, self.programs, self.given, self.names = ptx, shared, programs, given, names
        self.right = [x.clone() if isinstance(x, torch.Tensor) else None for x in given]
        kernel = self.run(ptx, self.right)
        self.name, self.limit, self.hazards = kernel.program.name, 4 * kernel.longest, set(kernel.hazards.counts)

    def run(self, ptx: str, out: list[Any], limit: int = Kernel.limit) -> Kernel:
        """With `out` for the tensors, which it writes into."""
        kernel = Kernel(ptx, self.shared)
        kernel.limit = limit
        kernel.launch(self.programs, [x if y is None else y for x, y in zip(self.given, out)], self.names)
        return kernel

    def noticed(self, mistake: Mistake) -> str:
        """By what: "fault", "hazard", "value"; or if by nothing whether the result is "near" or the "same"."""
        out = [x.clone() if isinstance(x, torch.Tensor) else None for x in self.given]
        try:
            kernel = self.run(mistake.planted(self.ptx), out, self.limit)
        except Fault:
            return "fault"
        kinds = {kind for kind, _ in self.hazards}
        if {kind for kind, _ in kernel.hazards.counts} - kinds:
            return "hazard"
        tensors = [(x, right) for x, right in zip(out, self.right) if x is not None and x.numel()]
        if all(x.numpy().tobytes() == right.numpy().tobytes() for x, right in tensors):
            return "same"
        return "value" if any(is_far(x, right, "forward" in self.name) for x, right in tensors) else "near"


def is_far(out: torch.Tensor, right: torch.Tensor, is_absolute: bool) -> bool:
    if not out.is_floating_point():
        return not torch.equal(out, right)
    (out, nan), (right, right_nan) = ((x.double().nan_to_num(nan=0.0), x.isnan()) for x in (out, right))
    largest = 1.0 if is_absolute else right[right.isfinite()].abs().max()
    apart = (out != right) & ~((out - right).abs() <= TOLERANCE * largest)
    return bool((nan != right_nan).any() or apart.any())


class Recorder(Machine):
    """Keeps the first launch of each kernel over tiles."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.launches: dict[str, tuple[Any, ...]] = {}

    def launch(self, kernel: Kernel, ptx: str, shared: int, programs: int, given: list[Any], names: list[str]) -> None:
        if ("mma.sync" in ptx or "wgmma" in ptx) and ptx not in self.launches:
            kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
            self.launches[ptx] = (ptx, shared, programs, kept, names)
        super().launch(kernel, ptx, shared, programs, given, names)


def launches(capability: int, loss: str) -> Iterator[Launch]:
    machine = Recorder(capability)
    with machine():
        test_ptx.evaluate(loss, test_ptx.FAST, torch.float16, torch.float16, backend="triton")
    for one in machine.launches.values():
        yield Launch(*one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of-a-kind", type=int, default=4, help="mistakes of a kind in a kernel")
    parser.add_argument("--sources", type=int, nargs="*", default=range(len(SOURCES)), help="numbers of SOURCES")
    given = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind, *_ in KINDS}
    began = time.monotonic()
    for capability, loss in (SOURCES[number] for number in given.sources):
        for launch in launches(capability, loss):
            for mistake in mistakes(launch.ptx, given.of_a_kind):
                by = launch.noticed(mistake)
                counts[mistake.kind][by] += 1
                if by in WAYS[3:]:
                    was = launch.ptx.split("\n")[mistake.line].strip()
                    print(f"{by}: sm_{capability} {loss}, {launch.name}: {mistake}; was: {was}", flush=True)
    print(f"\n| mistake | {' | '.join(WAYS)} |\n{'|---' * (1 + len(WAYS))}|")
    for kind, count in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"| {kind} | {' | '.join(str(count[by]) for by in WAYS)} |")
    noticed = sum(count[by] for count in counts.values() for by in WAYS[:3])
    made = sum(sum(count.values()) for count in counts.values())
    print(f"\n{noticed} of {made} mistakes noticed; {time.monotonic() - began:.0f} s")
    return int(noticed < LEAST * made or not made)


if __name__ == "__main__":
    sys.exit(main())
