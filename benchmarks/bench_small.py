"""Small problems, where the fixed costs of a call decide: a step over that of everything that people use instead.

One thread, forward and backward, D = 128. Medians over fresh processes, in each of which all competitors run in turns
(`small.py`, which also prints one of these rows). `make bench` alone runs those that are marked slow.
"""

from __future__ import annotations

import peers
import pytest
import small
from measure import MAX_GIGABYTES, Bar

LONGEST = 1.0  # of a step over that of any competitor
FEW, EXTRA_MICROSECONDS = 16, 100  # with so few rows a step may take so much longer than the eager one
COUNTS, QUICK_COUNT, QUICK_LOSSES = [16, 64, 256, 1024, 4096], 64, ("supcon", "ntxent", "infonce")
SIDES, QUICK_SIDE = [8, 16, 32, 64], 16
MANY, QUICK_MANY, FASTER = list(small.REGIONS), 64, 3.0


@pytest.fixture
def row(benchmark, report):
    """row(case, others, shape, bars): measure, and report a bar for each competitor that is installed."""

    def measured(case: str, others: list[str], shape: dict[str, int], bars, **figures: object) -> None:
        there = [name for name in others if not peers.why_not(name)]
        found = benchmark.pedantic(small.measure, args=(case, there, shape), rounds=1, iterations=1)
        seconds, ratios = found["seconds"], found["ratios"]
        for name in ratios:
            figures |= {f"over_{name}": ratios[name], f"{name}_seconds": seconds[name]}
        missing = [name for name in others if name not in ratios]
        reasons = [f"{name}: {peers.why_not(name) or f'more than {MAX_GIGABYTES:g} GB'}" for name in missing]
        note = "; ".join(reasons) or None
        report(seconds[case], [bars(name, seconds, ratios) for name in ratios], note=note, **figures)

    return measured


def _at_most(case: str, count: int | None = None):
    """The bar of each competitor: no slower, or of few rows little slower than the eager form."""

    def bar(name: str, seconds: dict[str, float], ratios: dict[str, float]) -> Bar:
        if count == FEW and name == f"eager_{case}":
            return Bar(f"microseconds more than {name}", 1e6 * (seconds[case] - seconds[name]), EXTRA_MICROSECONDS)
        return Bar(f"time over {name}", ratios[name], LONGEST)

    return bar


def _marked(is_quick: bool, *values: object):
    marks = [] if is_quick else [pytest.mark.slow]
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


@pytest.mark.benchmark(group="small problems")
@pytest.mark.parametrize(
    ("loss", "count"),
    [_marked(n == QUICK_COUNT and x in QUICK_LOSSES, x, n) for x in small.VECTORS for n in COUNTS],
)
def bench_small_vectors(row, loss, count):
    """`count` rows; of two views, half as many images."""
    row(*small.problem(loss, count), _at_most(loss, count), n=count)


@pytest.mark.benchmark(group="small problems")
@pytest.mark.parametrize("count", [_marked(False, n) for n in COUNTS])
@pytest.mark.skipif(bool(peers.why_not("compiled_supcon")), reason=str(peers.why_not("compiled_supcon")))
def bench_small_compiled_supcon(row, count):
    """Against `torch.compile` of the eager form, built for this very shape."""
    row("supcon", ["compiled_supcon"], {"count": count}, _at_most("supcon"), n=count)


@pytest.mark.benchmark(group="small problems")
@pytest.mark.parametrize("side", [_marked(side == QUICK_SIDE, side) for side in SIDES])
def bench_small_region_phpc(row, side):
    """One region of side x side pixels."""
    row(*small.problem("region_phpc", side), _at_most("region_phpc"), n=side * side)


@pytest.mark.benchmark(group="small problems")
@pytest.mark.parametrize("count", [_marked(count == QUICK_MANY, count) for count in MANY])
def bench_many_regions(row, count):
    """64 regions of 128 pixels, 256 of 64: the published loop over dense blocks takes so many times longer."""

    def bar(name: str, seconds: dict[str, float], ratios: dict[str, float]) -> Bar:
        return Bar(f"times faster than {name}", 1 / ratios[name], FASTER, at_least=True)

    row(*small.problem("regions", count), bar, regions=count)
