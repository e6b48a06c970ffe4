"""Search tile shapes on the GPU of this machine: `python -m benchmarks.tune [--rows 16384] [--only pair_lse]`.

For each kernel, width and precision every candidate that compiles is timed on random unit rows in four equal classes;
the fastest are timed again with fewer registers, so that more programs fit a multiprocessor. The fastest of all is
printed as a line for `hpcloss/backends/triton/configs.py`, beside the shipped one and its time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The package is found beside this folder, hence the late imports.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from hpcloss.backends import triton as backend  # noqa: E402
from hpcloss.backends.triton import configs  # noqa: E402
from hpcloss.plan.partition import partition  # noqa: E402

WIDTHS = (64, 128, 256, 512)
PRECISIONS = {"half": (torch.float16, "highest"), "tf32": (torch.float32, "high"), "ieee": (torch.float32, "highest")}
# All that have shapes of their own on some part, or may have.
KERNELS = tuple(
    dict.fromkeys(
        [*configs.SAME_AS, *(name for part in configs.CONFIGS.values() for shapes in part.values() for name in shapes)]
    )
)
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS, FEWEST_REGISTERS = 255, 96  # of a thread; with fewer, these kernels keep their tiles in local memory
FINALISTS = 4  # shapes that are tried with fewer registers


def shapes() -> Iterator[configs.Config]:
    """Shapes worth a try: at least a warp's matrix tile, at most what 255 registers could hold."""
    for block_i, block_j, warps, stages in itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if 256 <= block_i * block_j // warps <= 2048 * 2:
            yield configs.Config(block_i, block_j, warps, stages)


def with_fewer_registers(shape: configs.Config) -> Iterator[configs.Config]:
    """The shape with so few registers a thread that two, three or four programs share a multiprocessor's."""
    for programs in (2, 3, 4):
        registers = REGISTERS // (32 * shape.num_warps * programs) // 8 * 8
        if FEWEST_REGISTERS <= registers < MOST_REGISTERS:
            yield shape._replace(maxnreg=registers)


def work(kernel: str, rows: torch.Tensor) -> Callable[[], object]:
    """One call that runs the kernel, with its statistics where it is a backward pass."""
    count = rows.shape[0]
    labels = torch.arange(count, device=rows.device) * 4 // count
    at = list(partition(labels).intervals)
    scale = torch.full((), 10.0, device=rows.device)
    grad = torch.full((count,), 1 / count, device=rows.device)
    if "cross_entropy" in kernel:
        problem = (rows, None, scale, 10.0, 1.0 if "weighted" in kernel else 0.0, at)
        if not kernel.endswith("backward"):
            return lambda: backend.pair_cross_entropy(*problem)
        _, _, *of_rows = backend.pair_cross_entropy(*problem)
        return lambda: backend.pair_cross_entropy_backward(grad, None, *of_rows, *problem, True, False, False)
    lse = backend.pair_lse(rows, None, None, scale, 10.0, at, "negatives")
    if kernel == "pair_lse":
        return lambda: backend.pair_lse(rows, None, None, scale, 10.0, at, "negatives")
    mean = (rows, None, lse, None, scale, 10.0, 1.0, 0.0)
    if kernel == "pair_mean":
        return lambda: backend.pair_mean(*mean, at)
    out, mass, _ = backend.pair_mean(*mean, at)
    if kernel == "weighted_backward":
        return lambda: backend.pair_mean_backward(grad, out, mass, *mean, False, at, True, False, False)
    if kernel != "backward":
        raise ValueError(f"there is no call for {kernel}")

    def backward() -> None:
        backend.pair_lse_backward(grad, lse, rows, None, None, scale, 10.0, at, "negatives", True, False, False)
        backend.pair_mean_backward(grad, out, mass, *mean, True, at, True, False, False)

    return backward


@contextlib.contextmanager
def run_in(kernel: str, shape: configs.Config) -> Iterator[None]:
    """The kernel runs in this shape, the others in theirs."""
    shipped = configs.config
    configs.config = lambda name, rows: shape if name == kernel else shipped(name, rows)
    try:
        yield
    finally:
        configs.config = shipped


def search(kernel: str, call: Callable[[], object], time: Callable[..., float]) -> dict[configs.Config, float]:
    """The time of every shape that compiles, by `time(call)`, and of the fastest ones with fewer registers."""
    times: dict[configs.Config, float] = {}

    def attempt(shape: configs.Config) -> None:
        try:
            with run_in(kernel, shape):
                times[shape] = time(call)
        except Exception as error:  # too much shared memory, or more registers than there are
            print(f"  {tuple(shape)}: {type(error).__name__}", file=sys.stderr)

    for shape in shapes():
        attempt(shape)
    for shape in sorted(times, key=times.__getitem__)[:FINALISTS]:
        for fewer in with_fewer_registers(shape):
            attempt(fewer)
    return times


def milliseconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median time on the device."""
    call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def written(shape: configs.Config) -> str:
    """As in configs.py."""
    return f"Config{tuple(shape if shape.maxnreg is not None else shape[:4])}"


def main() -> int:
    """Print the fastest shape of each kernel; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--only", choices=KERNELS)
    parser.add_argument("--width", type=int, choices=WIDTHS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    print(
        f"{torch.cuda.get_device_name(device)}, part {configs.part(configs.capability(device))}, N = {arguments.rows}"
    )
    for (precision, (dtype, setting)), width, kernel in itertools.product(PRECISIONS.items(), WIDTHS, KERNELS):
        if arguments.only not in (None, kernel) or arguments.width not in (None, width):
            continue
        torch.set_float32_matmul_precision(setting)
        rows = torch.nn.functional.normalize(torch.randn(arguments.rows, width, device=device), dim=1).to(dtype)
        call = work(kernel, rows)
        times = search(kernel, call, milliseconds)
        best, shipped = min(times, key=times.__getitem__), configs.config(kernel, rows)
        print(
            f'("{kernel}", "{precision}", {width}): {written(best)},  # {times[best]:.3f} ms;'
            f" shipped {written(shipped)}: {milliseconds(call):.3f} ms",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
