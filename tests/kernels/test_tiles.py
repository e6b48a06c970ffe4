"""The bounds of the kernels' loops. They are row numbers even where nothing counts.

A compiler that loads tiles ahead adds their width to the start of a loop before it compares. A start near the largest
int32 then wraps around, and memory far from the rows is read. The interpreter and the values of a loss do not show it.
"""

import itertools

import pytest
import torch

from tests.tools.cases import choice
from tests.tools.kernels import DEVICE, needs_kernels

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton import language as tl  # noqa: E402

from hpcloss.backends.triton.tiles import Positives, hull_of, meeting, meeting_in_any_order, spans_of  # noqa: E402

pytestmark = needs_kernels

ROWS, KEYS = 16, 24  # of a block, and of a region, which starts at key 8
REGION = (8, 8 + KEYS)


@triton.jit
def spans_kernel(
    starts, ends, selves, members, bounds, first: tl.constexpr, last: tl.constexpr, RULE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    positives = Positives(tl.load(starts + rows), tl.load(ends + rows), tl.load(selves + rows))
    spans = spans_of(hull_of(positives, tl.load(members + rows) != 0), first, last, RULE)
    tl.store(bounds, spans.begin)
    tl.store(bounds + 1, spans.hole)
    tl.store(bounds + 2, spans.rest)
    tl.store(bounds + 3, spans.stop)


@triton.jit
def meeting_kernel(starts, ends, bounds, count, first, last, MEETING: tl.constexpr):
    low, high = MEETING(starts, ends, count, first, last)
    tl.store(bounds, low)
    tl.store(bounds + 1, high)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rule", ["positives", "negatives", "others", "every"])
@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize(
    "positives", [(0, 0), (40, 40), (8, 32), (0, 8), (32, 40), (10, 20), (0, 20), (20, 40), (0, 40)], ids=str
)
def test_spans_are_keys_of_the_region(positives, member, rule):
    bounds = int32([-1] * 4)
    start, end = positives
    spans_kernel[(1,)](
        int32([start] * ROWS), int32([end] * ROWS), int32([-1] * ROWS), int32([member] * ROWS), bounds,
        first=REGION[0], last=REGION[1], RULE=rule, ROWS=ROWS,
    )  # fmt: skip
    begin, hole, rest, stop = bounds.tolist()
    assert 0 <= begin <= hole <= REGION[1]
    assert 0 <= rest <= stop <= REGION[1]
    met = [*range(begin, hole), *range(rest, stop)]
    inside, region = set(range(start, end)), set(range(*REGION))
    wanted = {"positives": inside & region, "negatives": region - inside}.get(rule, region)
    assert met == (sorted(wanted) if member else [])  # rows of no region visit none in vain


def range_met(function, starts, ends, first, last):
    bounds = int32([-1, -1])
    # A pointer needs memory even where there are no intervals.
    memory = [torch.cat([torch.as_tensor(x, dtype=torch.int32, device=DEVICE), int32([0])]) for x in (starts, ends)]
    meeting_kernel[(1,)](*memory, bounds, len(starts), first, last, MEETING=function)
    return bounds.tolist()


def test_intervals_in_any_order():
    cases = [([], []), ([0, 16, 32], [16, 32, 48]), ([5, 5], [5, 5]), ([0] * 1100, [16] * 1100)]
    cases += [([32, 0, 7, 16], [48, 16, 7, 32]), ([90] * 1050 + [0, 3, 90], [99] * 1050 + [2, 9, 99])]
    for (starts, ends), first in itertools.product(cases, [0, 16, 40, 100]):
        met = [k for k, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < first + 16 and b > first and a < b]
        found = range_met(meeting_in_any_order, starts, ends, first, first + 16)
        assert found == ([met[0], met[-1] + 1] if met else [0, 0])


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 511, 512, 513, 65535, 65536, 65537, 70001])
def test_ascending_intervals(count):
    """Those met, by a search in one, two or three trips; some intervals are empty, and some rows are in none."""
    widths = choice([0, 1, 2, 5, 0, 0], count, seed=count)
    gaps = choice([0, 0, 0, 3], count, seed=count + 1)
    ends = (widths + gaps).cumsum(0)
    starts = ends - widths
    most = int(ends[-1]) if count else 0
    for first in sorted({0, 1, 37, most // 2, most - 16, most - 1, most, most + 5}):
        low, high = range_met(meeting, starts, ends, first, first + 16)
        assert low == int((ends <= first).sum()) and high == int((starts < first + 16).sum())
        met = ((starts < first + 16) & (ends > first) & (starts < ends)).nonzero().flatten()
        assert all(low <= k < high for k in met.tolist()), "every interval with rows of the block is in the range"


def test_more_intervals_than_a_search_can_number():
    """Beyond 2^24 the farthest places of the first trip are no int32."""
    starts = torch.arange(2**24 + 3)
    for first in (0, 2**24 - 20, 2**24 + 2, 2**24 + 3):
        assert range_met(meeting, starts, starts + 1, first, first + 16) == [first, min(first + 16, len(starts))]
