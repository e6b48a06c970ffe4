"""What `auto` chooses from on the CPU: the time of a primitive on the dense backend over that on the tiles.

    python benchmarks/choice.py                # every primitive, a few minutes
    python benchmarks/choice.py contrast 512   # one of them, of so many rows

Forward and backward on one thread, D = 128, four classes, one region. The backends take turns, and a figure is the
ratio of medians. The limits in `hpcloss/backends/pytorch.py` are made from this.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from cases import vectors
from measure import clock
from torch import Tensor

from hpcloss.plan.partition import Pairs, partition, two_by_two
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.one_positive import one_positive
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import pair_lse, pair_lse_both
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale

COUNTS = (128, 256, 384, 512, 724, 1024)
SECONDS = 0.3  # of the timing, for each backend


def _own_mean(rows: Rows, pairs: Pairs, scale: Scale) -> Tensor:
    stat = torch.full_like(rows.data[:, 0], 5.0)
    return pair_mean(rows, pairs, "own", scale, stat=stat, hardness=1.0)[0].sum()


def _both(rows: Rows, pairs: Pairs, scale: Scale) -> Tensor:
    of_rows, of_keys = pair_lse_both(rows, rows.view(), pairs, "every", scale)
    return of_rows.sum() + of_keys.sum()


def _two(rows: Rows, pairs: Pairs, scale: Scale) -> Tensor:
    images = two_by_two(rows.data.shape[0] // 2, rows.data.device)
    return torch.stack(one_positive(rows, images, scale, factors=(2.0, 1.0))[1]).sum()


PRIMITIVES: dict[str, Callable[[Rows, Pairs, Scale], Tensor]] = {
    "contrast": lambda rows, pairs, scale: contrast(rows, pairs, scale=scale, denominator="all")[0].sum(),
    "contrast own": lambda rows, pairs, scale: contrast(rows, pairs, scale=scale, hardness=1.0)[0].sum(),
    "pair_lse": lambda rows, pairs, scale: pair_lse(rows, pairs, "negatives", scale).sum(),
    "pair_lse_both": _both,
    "one_positive": _two,
    "pair_mean": _own_mean,
    "pair_cross_entropy": lambda rows, pairs, scale: pair_cross_entropy(rows, pairs, scale)[0].sum(),
}


def ratio(name: str, count: int, dtype: torch.dtype) -> float:
    """Median time on the dense backend over that on the tiles."""
    embeddings, labels = vectors(count)
    embeddings, pairs = embeddings.detach().to(dtype).requires_grad_(), partition(labels)

    def step(backend: str) -> None:
        rows = pack(embeddings, pairs.order, pairs.live(), normalize=True, permutation=True, backend=backend)
        PRIMITIVES[name](rows, pairs, Scale.of(0.1, rows, True)).backward()
        embeddings.grad = None

    taken: dict[str, list[float]] = {"dense": [], "blockwise": []}
    for backend in taken:
        step(backend)
    while sum(taken["dense"]) < SECONDS or len(taken["dense"]) < 5:
        for backend, seconds in taken.items():
            start = clock()
            step(backend)
            seconds.append(clock() - start)
    return statistics.median(taken["dense"]) / statistics.median(taken["blockwise"])


def main() -> None:
    """Print a line for each primitive and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("primitive", nargs="?", choices=PRIMITIVES)
    parser.add_argument("rows", nargs="?", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = (arguments.rows,) if arguments.rows else COUNTS
    print(f"{'dense over blockwise':28}" + "".join(f"{count:>8}" for count in counts))
    for name in (arguments.primitive,) if arguments.primitive else PRIMITIVES:
        for dtype in (torch.float32, torch.float64):
            figures = [ratio(name, count, dtype) for count in counts]
            print(f"{name + ', ' + str(dtype)[6:]:28}" + "".join(f"{figure:8.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
