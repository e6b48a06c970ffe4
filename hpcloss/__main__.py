"""Self-check of an installation: `python -m hpcloss`.

It prints the versions and `hpcloss.info()`. Then it compares five losses, which together use every primitive, with
`hpcloss.reference` in float64, and times them, on every backend of the device. It needs torch alone and takes about ten
seconds. The first run on a GPU takes longer, because Triton compiles its kernels. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hpcloss import __version__, functional, reference
from hpcloss.backends import available, info
from hpcloss.memory import EmbeddingQueue

# Largest allowed error, relative to the largest entry. Logits amplify rounding by 1 / temperature, up to 14 times here.
# Measured on a CPU: 2e-6 in float32, 6e-4 in float16. A GPU also rounds the unit rows to float16, so float16 gets the
# limit of the trial in `hpcloss.backends.triton.trial`. A wrong sign or factor exceeds both limits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}
IMAGES, CHANNELS, HEIGHT, WIDTH, CLASSES = 2, 64, 16, 32, 4  # 1,024 rows, the most that backend "dense" accepts
QUEUE_SIZE = 128  # embeddings per class
ROUNDS, SECONDS = 3, 0.3  # the timing of a row takes at least both


class Problem(NamedTuple):
    """A loss by its name, the inputs that get a gradient, and the other arguments."""

    name: str
    leaves: list[Tensor]
    shared: dict[str, Any]
    of_loss: dict[str, Any] = {}  # without a part in the reference
    of_reference: dict[str, Any] = {}

    def loss(self, backend: str) -> Callable[..., Tensor]:
        """The loss on a backend, a function of the leaves."""
        return partial(getattr(functional, f"{self.name}_loss"), **self.shared, **self.of_loss, backend=backend)

    def dense(self) -> Callable[..., Tensor]:
        """The same loss in plain PyTorch."""
        return partial(getattr(reference, f"{self.name}_loss"), **self.shared, **self.of_reference)


def problems(device: torch.device) -> list[Problem]:
    """The losses to check. Their inputs are the same in every call."""
    generator = torch.Generator("cpu")  # with its default seed; the global generator stays as it is

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    features = normal(IMAGES, CHANNELS, HEIGHT, WIDTH)
    labels = torch.randint(CLASSES, (IMAGES, HEIGHT, WIDTH), generator=generator).to(device)
    rows = features.movedim(1, -1).reshape(-1, CHANNELS)
    partner = torch.arange(IMAGES, device=device).roll(1)
    queue = EmbeddingQueue(CLASSES, QUEUE_SIZE, CHANNELS).to(device)
    queue.embeddings.copy_(normalize(normal(CLASSES, QUEUE_SIZE, CHANNELS), dim=-1))
    queue.filled.fill_(QUEUE_SIZE)
    of_slots = torch.arange(CLASSES, device=device).repeat_interleave(QUEUE_SIZE)
    bank = {"bank": queue.embeddings.flatten(0, 1), "bank_labels": of_slots}
    of_map, whole = {"labels": labels, "num_classes": CLASSES}, {"samples_per_class": None}
    return [
        Problem("region_phpc", [features], {"labels": labels}),
        Problem("supcon", [rows], {"labels": labels.reshape(-1)}),
        Problem("infonce", [rows, rows + normal(*rows.shape)], {"symmetric": True}),
        Problem("local_contrast", [features], {**of_map, "partner": partner}, whole),
        Problem("pixel_contrast", [features], of_map, {**whole, "queue": queue}, bank),
    ]


def step(loss: Callable[..., Tensor], leaves: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """Value and gradients of a loss, and the milliseconds of its forward and backward pass."""
    inputs = [leaf.detach().to(dtype, copy=True).requires_grad_() for leaf in leaves]
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    wait()
    return [value.detach(), *gradients], (time.perf_counter() - start) * 1e3


def check(problem: Problem, backend: str, dtype: torch.dtype, exact: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether a backend computes the exact value and gradients; and the columns of its row, from the error on."""
    ours, plain = (problem.loss(backend), problem.leaves, dtype), (problem.dense(), problem.leaves, torch.float32)
    times: list[tuple[float, float]] = []
    try:
        found, _ = step(*ours)
        errors = [(x.cpu().double() - y).abs().max() / y.abs().max() for x, y in zip(found, exact, strict=True)]
        step(*plain)  # warm, as the loss is now
        start = time.perf_counter()
        while len(times) < ROUNDS or time.perf_counter() - start < SECONDS:  # in turns: other work slows both
            times.append((step(*ours)[1], step(*plain)[1]))
    except Exception as error:  # whatever a backend raises
        message = (str(error).strip() or "no message").splitlines()[0]
        return False, f"{'-':>7}  FAILED   {type(error).__name__}: {message}"
    worst, (own, eager) = torch.stack(errors).max().item(), map(statistics.median, zip(*times))
    correct = worst <= TOLERANCES[dtype]  # False for NaN
    return correct, f"{worst:7.1e}  {'ok' if correct else 'FAILED':7}{own:9.2f}{eager:9.2f}{own / eager:8.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print a row for each, and return the exit code."""
    parser = argparse.ArgumentParser("python -m hpcloss", description="Check this installation of hpcloss.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="device to check (default here: %(default)s)")
    name = parser.parse_args(arguments).device
    try:
        example = torch.empty(0, 1, device=name)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must be a device of this machine, got {name!r}: {str(error).splitlines()[0]}")
    backends, device = available(example), example.device
    if not backends:
        parser.error(f"--device must be a device that a backend supports, got {name!r}")
    dtypes = {"float32": torch.float32} | ({"float16": torch.float16} if example.is_cuda else {})
    limits = ", ".join(f"{TOLERANCES[dtype]:g} in {name}" for name, dtype in dtypes.items())
    print(f"""hpcloss {__version__}, Python {platform.python_version()}, {platform.platform()}
{info()}

{IMAGES * HEIGHT * WIDTH:,} rows of {CHANNELS} channels on {device}, {torch.get_num_threads()} CPU threads
error: of value and gradients against float64, relative to the largest entry; limit {limits}
ms: median of forward + backward; eager: the same of the dense reference in float32
Each row has its backend; "auto" takes the one that suits the size. Other work on the machine changes the ratios.

loss            backend    dtype      error  verdict       ms    eager   ratio""")
    verdicts = []
    for problem, on_cpu in zip(problems(device), problems(torch.device("cpu")), strict=True):
        for name, dtype in dtypes.items():
            exact, _ = step(on_cpu.dense(), [leaf.to(dtype) for leaf in on_cpu.leaves], torch.float64)  # rounded inputs
            for backend in backends:
                correct, columns = check(problem, backend, dtype, exact)
                verdicts.append(correct)
                print(f"{problem.name:15} {backend:10} {name:8} {columns}", flush=True)
    print(f"\n{sum(verdicts)} of {len(verdicts)} checks passed.")
    if all(verdicts):
        return 0
    print("Please open a bug report that contains this whole output.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
