"""Sampling: the written definition in plain Python, bit for bit; distributions; static shapes."""

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcloss.plan import draw
from hpcloss.plan import philox as philox_words
from hpcloss.plan.sampling import (
    Sample,
    choose_regions,
    philox,
    sample,
    sample_anchors,
    sample_hard_easy,
    sample_positives,
)
from tests.tools.cases import choice, implementations

MASK = 0xFFFFFFFF
# The emulated GPU is slow, and where it gives the same integers it gives the same distribution.
drawn_often = pytest.mark.usefixtures("not_emulated")


@pytest.fixture(scope="module", autouse=True, params=["native", "cuda", "torch"])
def implementation(request):
    """Everything here holds for the native library, for its CUDA sources and for the PyTorch implementation alike."""
    yield from implementations(request.param)


@pytest.fixture
def not_emulated(implementation):
    if implementation == "cuda":
        pytest.skip("thousands of draws")


# ---- the definition in plain Python: integers, and one NumPy float32 division ----


def philox_block(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def key_words(seed):
    return seed & MASK, (seed >> 32) & MASK


def pixel_word(seed, pixel):
    block = pixel >> 2
    return philox_block((block & MASK, block >> 32, 0, 0), key_words(seed))[pixel & 3]


def draw_word(seed, row, draw):
    return philox_block((row & MASK, row >> 32, draw >> 2, 1), key_words(seed))[draw & 3]


def negative_log2(word):
    """40 fraction bits."""
    coefficients = (774540888, 193649403, 64260302, 26358647, 1840421, 19010875, -13089007, 7170137)
    zeros = 32 - word.bit_length()
    v = (1 << 33) - ((2 * word + 1) << zeros)
    q = coefficients[7]
    for coefficient in coefficients[6::-1]:
        q = ((q * v) >> 32) + coefficient
    return (zeros << 40) + ((v * q) >> 22)


def image(value):
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return ~bits & MASK if bits >> 31 else bits | 0x80000000


def weighted_key(word, weight):
    """None where the element is absent."""
    weight = np.float32(weight)
    if not weight > 0:
        return None
    with np.errstate(over="ignore", under="ignore"):
        return image(np.float32(negative_log2(word)) * np.float32(2.0**-40) / weight)


def score_key(score):
    return MASK if math.isnan(score) else image(np.float32(0.0) - np.float32(score))


def smallest(rows, keys, k):
    present = [row for row in rows if keys[row] is not None]
    return sorted(sorted(present, key=lambda row: (keys[row], row))[:k])


def compact(order, offsets, k, choose):
    """The lists that `sample` must return, for a choice of rows per interval."""
    chosen, starts = [], [0]
    for first, last in itertools.pairwise(offsets):
        chosen += [order[row] for row in choose(range(first, last))]
        starts.append(len(chosen))
    return chosen + [0] * ((len(offsets) - 1) * k - len(chosen)), starts


def hard_easy(rows, wrong, keys, k):
    hard = [row for row in rows if wrong[row]]
    easy = [row for row in rows if not wrong[row]]
    # as published, and everything where both halves are short
    if 2 * len(hard) >= k and 2 * len(easy) >= k:
        keep = k // 2
    elif 2 * len(hard) >= k:
        keep = k - len(easy)
    else:
        keep = len(hard)
    keep = min(keep, len(hard))
    return sorted(smallest(hard, keys, keep) + smallest(easy, keys, k - keep))


def positives(first, last, own, k, seed, row):
    candidates = [r for r in range(first, last) if r != own]
    n, taken = len(candidates), set()
    m = min(k, n)
    for d in range(m):
        j = n - m + d
        t = (draw_word(seed, row, d) * (j + 1)) >> 32
        taken.add(j if t in taken else t)
    assert len(taken) == m
    return [candidates[t] for t in sorted(taken)] + [-1] * (k - m)


# ---- random words ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the Random123 distribution, philox4x32 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = philox_words.philox_block(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert [int(w) for w in got] == words
    assert list(philox_block(counter, key)) == words


def test_philox_serves_four_counters_per_block():
    got = philox(torch.tensor(0), torch.arange(4))
    assert got.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, torch.tensor(2)).item() == 0xBC57AC4C


@settings(deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), counter=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_philox_matches_definition(seed, counter):
    got = philox(torch.tensor(seed), torch.tensor(counter))
    assert got.tolist() == [pixel_word(seed, p) for p in counter]
    assert torch.equal(got, philox(seed, torch.tensor(counter)))


def test_words_by_block_and_by_pixel_agree():
    n = 3 * philox_words._CHUNK // 2 + 3  # several cache-sized pieces and a partial block
    assert torch.equal(
        philox_words.dense_words(philox_words.key_words(torch.tensor(-7)), n), philox(-7, torch.arange(n))
    )


@settings(deadline=None)
@given(st.integers(0, MASK) | st.integers(0, 32).map(lambda b: (1 << b) - 1) | st.integers(0, 31).map(lambda b: 1 << b))
def test_negative_log2(word):
    got = draw._negative_log2(torch.tensor([word])).item()
    assert got == negative_log2(word)
    x = 2 * word + 1
    exact = -math.log1p((x - 2**33) / 2**33) / math.log(2)
    assert abs(got / 2**40 - exact) <= 2**-22 * exact + 2**-40


def test_keys_match_definition():
    """The keys themselves: a last bit seldom changes a sample."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 1 << 32, (4000,), generator=generator)
    weights = torch.randn(4000, generator=generator).mul(30).exp()  # over the whole range of float32 and beyond
    assert draw._weighted_keys(words, weights).tolist() == [
        1 << 32 if (key := weighted_key(r, w)) is None else key
        for r, w in zip(words.tolist(), weights.tolist(), strict=True)
    ]
    scores = torch.cat(
        [torch.randn(100, generator=generator), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]
    )
    assert draw._hardest_keys(scores).tolist() == [score_key(score) for score in scores.tolist()]


# ---- samples against the definition ----

AWKWARD = [0.0, -0.0, 1.0, 1.0, 2.0, 0.5, -1.0, 1e-3, 3e38, 1e-45, 1e-38, math.inf, -math.inf, math.nan]
floats = st.sampled_from(AWKWARD) | st.floats(width=32)


@st.composite
def plans(draw):
    """(order, offsets, num_pixels): a partition with empty intervals, dead rows on both sides and unnamed pixels."""
    sizes = draw(st.lists(st.integers(0, 9), max_size=6))
    head, tail, unnamed = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 5, 300]))
    offsets = [head, *(head + total for total in itertools.accumulate(sizes))]
    n = offsets[-1] + tail
    order = draw(st.permutations(range(n + unnamed)))[:n] if unnamed < 100 else [3 * i for i in range(n)]
    return order, offsets, n + unnamed if unnamed < 100 else 3 * n + unnamed


seeds = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(1, 12)
integers = st.sampled_from([torch.int32, torch.int64])


@settings(max_examples=600, deadline=None)
@given(plan=plans(), k=counts, seed=seeds, mode=st.sampled_from(["uniform", "weights", "scores"]), data=st.data())
def test_sample_matches_definition(plan, k, seed, mode, data):
    order, offsets, num_pixels = plan
    dtype = data.draw(integers)
    arguments = {"num_pixels": num_pixels}
    if mode == "uniform":
        keys = [pixel_word(seed, p) for p in order]
    else:
        # few distinct values, so that ties are common
        pool = data.draw(st.lists(floats, min_size=1, max_size=8))
        values = [pool[(p * 7 + 3) % len(pool)] for p in range(num_pixels)]
        arguments[mode] = torch.tensor(values, dtype=torch.float32)
        if mode == "weights":
            keys = [weighted_key(pixel_word(seed, p), values[p]) for p in order]
        else:
            keys = [score_key(values[p]) for p in order]
    got = sample(
        torch.tensor(order, dtype=dtype), torch.tensor(offsets, dtype=dtype), k, seed=torch.tensor(seed), **arguments
    )
    expected_order, expected_offsets = compact(order, offsets, k, lambda rows: smallest(rows, keys, k))
    assert got.order.dtype == got.offsets.dtype == dtype
    assert got.order.tolist() == expected_order
    assert got.offsets.tolist() == expected_offsets


@settings(max_examples=300, deadline=None)
@given(plan=plans(), k=counts, seed=seeds, dtype=integers, pattern=st.lists(st.booleans(), min_size=1, max_size=9))
def test_hard_easy_matches_definition(plan, k, seed, dtype, pattern):
    order, offsets, num_pixels = plan
    wrong = [pattern[p % len(pattern)] for p in range(num_pixels)]
    keys = [pixel_word(seed, p) for p in order]
    wrong_rows = [wrong[p] for p in order]
    got = sample_hard_easy(
        torch.tensor(order, dtype=dtype),
        torch.tensor(offsets, dtype=dtype),
        k,
        torch.tensor(wrong, dtype=torch.bool),
        seed=seed,
    )
    expected_order, expected_offsets = compact(order, offsets, k, lambda rows: hard_easy(rows, wrong_rows, keys, k))
    assert got.order.tolist() == expected_order
    assert got.offsets.tolist() == expected_offsets


@settings(max_examples=300, deadline=None)
@given(
    intervals=st.lists(st.tuples(st.integers(0, 40), st.integers(-3, 14), st.integers(-3, 16)), max_size=8),
    k=counts,
    seed=seeds,
    dtype=integers,
)
def test_positives_match_definition(intervals, k, seed, dtype):
    # (start, length, self relative to the start); negative lengths are empty intervals, self may be outside
    start, end, own = [], [], []
    for first, length, relative in intervals:
        start.append(first)
        end.append(first + length)
        own.append(max(first + relative, -1))
    got = sample_positives(*(torch.tensor(x, dtype=dtype) for x in (start, end, own)), k, seed=torch.tensor(seed))
    assert got.dtype == dtype
    assert got.shape == (len(intervals), k)
    for row, line in enumerate(got.tolist()):
        assert line == positives(start[row], end[row], own[row], k, seed, row)


def test_sample_matches_definition_at_size():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 5, (20_003,), generator=generator)
    order = torch.sort(groups, stable=True).indices
    offsets = torch.nn.functional.pad(torch.bincount(groups, minlength=5).cumsum(0), (1, 0))
    weights = torch.rand(groups.shape, generator=generator)
    chunk, philox_words._CHUNK = philox_words._CHUNK, 1000  # pieces must not show
    try:
        uniform, weighted = sample(order, offsets, 64, seed=3), sample(order, offsets, 64, seed=3, weights=weights)
    finally:
        philox_words._CHUNK = chunk
    words = [pixel_word(3, p) for p in order.tolist()]
    assert list(map(torch.Tensor.tolist, uniform)) == list(
        compact(order.tolist(), offsets.tolist(), 64, lambda rows: smallest(rows, words, 64))
    )
    keys = [weighted_key(word, w) for word, w in zip(words, weights[order].tolist(), strict=True)]
    assert list(map(torch.Tensor.tolist, weighted)) == list(
        compact(order.tolist(), offsets.tolist(), 64, lambda rows: smallest(rows, keys, 64))
    )


# ---- small cases by hand ----


def test_hardest_first_by_hand():
    # interval 0 = pixels 4, 2, 0; interval 1 empty; interval 2 = pixels 1, 3, 5
    order, offsets = torch.tensor([4, 2, 0, 1, 3, 5]), torch.tensor([0, 3, 3, 6])
    scores = torch.tensor([0.9, math.nan, 0.1, 0.0, 0.9, -0.0])
    got = sample(order, offsets, 2, seed=0, scores=scores)
    # 4 and 0 score highest; of the tie 0.0 = -0.0 both beat NaN
    assert got.order.tolist() == [4, 0, 3, 5, 0, 0]
    assert got.offsets.tolist() == [0, 2, 2, 4]
    assert sample(order, offsets, 1, seed=0, scores=scores).order.tolist() == [4, 3, 0]
    # a tie of -0.0 and 0.0 goes to the earlier position, whichever stands there
    for scores in (torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])):
        assert sample(torch.arange(2), torch.tensor([0, 2]), 1, seed=0, scores=scores).order.tolist() == [0]


def test_unusable_weights_are_never_chosen():
    weights = torch.tensor([0.0, -1.0, math.nan, 1e-30, math.inf])
    got = sample(torch.arange(5), torch.tensor([0, 5]), 4, seed=1, weights=weights)
    assert got.order.tolist() == [3, 4, 0, 0]
    assert got.offsets.tolist() == [0, 2]
    assert sample(torch.arange(5), torch.tensor([0, 5]), 1, seed=1, weights=weights).order.tolist() == [4]


def test_hard_easy_quota_by_hand():
    order, offsets = torch.arange(10), torch.tensor([0, 10])
    for num_wrong, expected in [(0, 0), (1, 1), (2, 2), (5, 2), (7, 2), (8, 3), (10, 5)]:  # k = 5: floor(5 / 2) = 2
        wrong = torch.arange(10) < num_wrong
        got = sample_hard_easy(order, offsets, 5, wrong, seed=2).order
        assert int(wrong[got].sum()) == expected
        assert len(set(got.tolist())) == 5


def test_dead_rows_may_hold_anything():
    order = torch.tensor([-5, 0, 1, 2, 3, 10**9])
    offsets = torch.tensor([1, 3, 5])
    got = sample(order, offsets, 3, seed=0, weights=torch.ones(4))
    assert got.order.tolist() == [0, 1, 2, 3, 0, 0]
    assert sample_hard_easy(order, offsets, 3, torch.ones(4, dtype=torch.bool), seed=0).offsets.tolist() == [0, 2, 4]


def test_maps_of_other_dtypes_and_layouts():
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(6, 4, 5, generator=generator).half().permute(1, 2, 0)  # not contiguous
    order, offsets = torch.arange(120), torch.tensor([0, 50, 120])
    flat = weights.float().contiguous().reshape(-1)
    for name in ("weights", "scores"):
        expected = sample(order, offsets, 7, seed=5, **{name: flat})
        for other in (weights, flat.double(), flat.clone().requires_grad_()):
            assert all(map(torch.equal, sample(order, offsets, 7, seed=5, **{name: other}), expected))


def test_a_sample_can_be_sampled():
    order, offsets = torch.randperm(1000), torch.tensor([0, 400, 1000])
    first = sample(order, offsets, 20, seed=6)
    second = sample(*first, 5, seed=6, num_pixels=1000)
    # a pixel keeps its word, so the smallest of the smallest are the smallest
    direct = sample(order, offsets, 5, seed=6)
    assert all(map(torch.equal, second, direct))


def test_everything_empty():
    none = torch.zeros(0, dtype=torch.int32)
    assert sample(none, torch.zeros(1, dtype=torch.int32), 3, seed=0).order.shape == (0,)
    got = sample(none, torch.zeros(3, dtype=torch.int32), 2, seed=0)
    assert got.order.tolist() == [0] * 4 and got.offsets.tolist() == [0] * 3
    got = sample_hard_easy(none, torch.zeros(2, dtype=torch.int32), 2, torch.zeros(0, dtype=torch.bool), seed=0)
    assert got.order.tolist() == [0, 0]
    assert sample_positives(none, none, none, 3, seed=0).shape == (0, 3)


# ---- distributions ----


def chi_square(counts, probabilities):
    """In standard deviations above the mean of its distribution."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = counts.sum() * probabilities / probabilities.sum()
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def subsets_drawn(intervals, size, k, seed, **maps):
    """How often each subset of positions was drawn from `intervals` intervals of the same `size`."""
    n = intervals * size
    got = sample(torch.arange(n), torch.arange(0, n + 1, size), k, seed=seed, **maps)
    assert got.offsets.tolist() == list(range(0, intervals * k + 1, k))
    code = (1 << (got.order % size)).reshape(intervals, k).sum(1)
    drawn = torch.bincount(code, minlength=1 << size)
    return [int(drawn[sum(1 << i for i in subset)]) for subset in itertools.combinations(range(size), k)]


@drawn_often
@pytest.mark.parametrize(("size", "k"), [(7, 1), (7, 3), (8, 5)])
def test_uniform_over_subsets(size, k):
    counts = subsets_drawn(20_000, size, k, seed=11)
    assert abs(chi_square(counts, [1] * len(counts))) < 4


def test_uniform_over_seeds():
    order, offsets = torch.arange(10), torch.tensor([0, 10])
    drawn = torch.zeros(10, dtype=torch.long)
    for seed in range(1000):
        drawn[sample(order, offsets, 1, seed=seed).order] += 1
    assert abs(chi_square(drawn, [1] * 10)) < 4


@drawn_often
def test_weighted_inclusion_probabilities():
    weights = [0.1, 0.2, 0.4, 1.0, 3.0, 0.0, 5.3]
    counts = subsets_drawn(40_000, 7, 1, seed=12, weights=torch.tensor(weights).repeat(40_000))
    assert counts[5] == 0
    del counts[5], weights[5]
    assert abs(chi_square(counts, weights)) < 4
    # the test can tell weights that are 5 % off
    assert chi_square(counts, [w**1.05 for w in weights]) > 4


@drawn_often
def test_weighted_pairs_are_drawn_one_after_the_other():
    weights = [1.0, 2.0, 3.0, 4.0, 10.0]
    total = sum(weights)
    pair = [a * b / total * (1 / (total - a) + 1 / (total - b)) for a, b in itertools.combinations(weights, 2)]
    counts = subsets_drawn(30_000, 5, 2, seed=13, weights=torch.tensor(weights).repeat(30_000))
    assert abs(chi_square(counts, pair)) < 4


@drawn_often
def test_weighted_is_uniform_at_equal_weights():
    counts = subsets_drawn(20_000, 6, 2, seed=14, weights=torch.full((120_000,), 0.3))
    assert abs(chi_square(counts, [1] * len(counts))) < 4


@drawn_often
def test_hard_easy_halves_are_uniform():
    intervals, size, k = 10_000, 10, 4
    wrong = torch.tensor([True] * 5 + [False] * 5).repeat(intervals)
    n = intervals * size
    got = sample_hard_easy(torch.arange(n), torch.arange(0, n + 1, size), k, wrong, seed=15).order % size
    drawn = torch.bincount(got, minlength=size)
    assert int(drawn[:5].sum()) == 2 * intervals
    # sampling 2 of 5 without replacement has less variance than a multinomial, by (5 - 2) / (5 - 1)
    assert chi_square(drawn[:5], [1] * 5) < 4 and chi_square(drawn[5:], [1] * 5) < 4


@pytest.mark.parametrize("k", [1, 2, 3])
def test_positives_uniform_over_subsets(k):
    anchors = 20_000
    start = torch.full((anchors,), 10)
    got = sample_positives(start, start + 7, start + 3, k, seed=torch.tensor(16))
    code = (1 << (got - 10)).sum(1)
    drawn = torch.bincount(code, minlength=128)
    subsets = list(itertools.combinations([0, 1, 2, 4, 5, 6], k))  # never row 3, itself
    counts = [int(drawn[sum(1 << i for i in subset)]) for subset in subsets]
    assert sum(counts) == anchors
    assert abs(chi_square(counts, [1] * len(counts))) < 4


def test_seed_decides():
    order, offsets = torch.arange(1000), torch.tensor([0, 300, 1000])
    weights, wrong = torch.rand(1000), torch.rand(1000) < 0.5
    start = torch.zeros(50, dtype=torch.long)
    draws = [
        lambda seed: sample(order, offsets, 20, seed=seed).order,
        lambda seed: sample(order, offsets, 20, seed=seed, weights=weights).order,
        lambda seed: sample_hard_easy(order, offsets, 20, wrong, seed=seed).order,
        lambda seed: sample_positives(start, start + 50, torch.arange(50), 4, seed=seed),
    ]
    for one in draws:
        for other in (1, -1, 1 << 32):  # both words of the seed count
            assert torch.equal(one(torch.tensor(0)), one(0))
            assert not torch.equal(one(0), one(other))


# ---- static shapes, no host reads ----


def arguments(device="cpu"):
    order, offsets = torch.arange(64, device=device), torch.arange(0, 65, 16, device=device)
    return order, offsets, torch.ones((), dtype=torch.int64, device=device)


def everything(order, offsets, seed):
    """Every function and mode; the maps are made from `order` so that this can be traced."""
    values = (order % 7).float()
    return (
        *sample(order, offsets, 5, seed=seed),
        *sample(order, offsets, 5, seed=seed, weights=values),
        *sample(order, offsets, 5, seed=seed, scores=values),
        *sample(order[:8], offsets[:1], 5, seed=seed, num_pixels=1000),
        *sample_hard_easy(order, offsets, 5, values > 3, seed=seed),
        sample_positives(offsets[:-1], offsets[1:], offsets[:-1], 5, seed=seed),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_runs_without_data(device):
    """Such tensors have shapes but no data: any read on the host, and any shape made of data, raises."""
    with FakeTensorMode():
        results = everything(*arguments(device))
    assert [list(r.shape) for r in results] == [[20], [5]] * 3 + [[0], [1]] + [[20], [5], [4, 5]]
    assert all(r.device.type == device for r in results)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    order, offsets, seed = arguments()
    for step in range(3):  # the seed is data, not a constant of the graph
        assert all(map(torch.equal, compiled(order, offsets, seed + step), everything(order, offsets, seed + step)))
    assert not torch.equal(everything(order, offsets, seed)[0], everything(order, offsets, seed + 1)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu_without_sync():
    expected = everything(*arguments())
    inputs = arguments("cuda")
    everything(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(r.cpu(), e) for r, e in zip(results, expected, strict=True))


# ---- regions ----


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def some_regions():
    """400 pixels in 8 regions, of which 0, 2, 3 and 5 hold an anchor and two labels."""
    regions, labels, alive, anchor = (choice(range(high), 400, seed=high) for high in (8, 3, 10, 2))
    alive, anchor = alive > 0, anchor > 0
    anchor[(regions == 1) | (regions == 4)] = False
    labels[regions == 6] = 2
    alive[(regions == 7) & (labels != 1)] = False
    return regions, 8, labels, alive, anchor


@pytest.mark.parametrize("keep", [1, 2, 4, 6])
def test_choose_regions(keep):
    regions, *rest = some_regions()
    ids, old = choose_regions(regions, *rest, keep)
    number = min(keep, 4)
    assert old.shape == (keep,) and len(set(old[:number].tolist())) == number and not old[number:].any()
    kept = ids < keep
    assert set(regions[kept].tolist()) <= {0, 2, 3, 5} and ids[kept].unique().tolist() == list(range(number))
    assert torch.equal(old[ids[kept]], regions[kept])  # renumbered as `old` says
    assert (ids[~kept] == keep).all()
    assert all(kept[regions == region].unique().numel() == 1 for region in range(8))  # whole regions


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62 + 12345])
def test_regions_are_chosen_as_defined(seed, default_dtype):
    """The same at any default dtype."""
    for keep in (1, 2, 3, 4):
        expected = sorted(sorted((0, 2, 3, 5), key=lambda region: (pixel_word(seed, region), region))[:keep])
        assert choose_regions(*some_regions(), keep, seed=seed)[1].tolist() == expected


@drawn_often
def test_regions_are_chosen_uniformly(default_dtype):
    regions, anchor = torch.arange(5).repeat(2), torch.tensor([True, True, False, True, True]).repeat(2)
    labels, alive = torch.arange(10), torch.ones(10, dtype=torch.bool)
    seen = torch.zeros(5, dtype=torch.int64)
    for _ in range(600):
        ids, _ = choose_regions(regions, 5, labels, alive, anchor, 2)
        seen += ids[:5] < 2
    assert seen[2] == 0 and (seen[anchor[:5]] > 230).all()  # 300 each; 5.7 standard deviations


def test_many_regions_are_chosen_uniformly(default_dtype):
    """Keys of few digits would tie, and ties go to the first regions."""
    n, keep = 100_000, 1000
    regions = torch.arange(n).repeat(2)
    everywhere = torch.ones(2 * n, dtype=torch.bool)
    _, old = choose_regions(regions, n, torch.arange(2 * n), everywhere, everywhere, keep)
    assert len(old.unique()) == keep
    assert abs(old.double().mean().item() / n - 0.5) < 5 * math.sqrt(1 / 12 / keep)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        (
            {"weights": torch.ones(9), "scores": torch.ones(9)},
            ValueError,
            "at most one of weights and scores may be given, got both",
        ),
        ({"weights": torch.ones(9, dtype=torch.long)}, TypeError, "weights must be floating, got torch.int64"),
        ({"scores": torch.ones(9), "num_pixels": 8}, ValueError, "scores must have num_pixels = 8 values, got 9"),
        ({"scores": torch.ones(0)}, ValueError, "scores must have one value per pixel, got none"),
        ({"weights": torch.ones(9, device="meta")}, ValueError, "weights must be on cpu, as order, got meta"),
        (
            {"order": torch.zeros(3, 3, dtype=torch.long)},
            ValueError,
            r"order must have one dimension, got shape \[3, 3\]",
        ),
        ({"order": torch.zeros(9)}, TypeError, "order must be int32 or int64, got torch.float32"),
        ({"offsets": torch.zeros(0, dtype=torch.long)}, ValueError, r"offsets must have shape \[S \+ 1\], got \[0\]"),
        ({"offsets": torch.tensor([0, 9], device="meta")}, ValueError, "offsets must be on cpu, as order, got meta"),
        ({"seed": torch.zeros(1, dtype=torch.long)}, ValueError, r"seed must have shape \[\], got \[1\]"),
        ({"seed": torch.tensor(0, dtype=torch.int32)}, TypeError, "seed must be int64, got torch.int32"),
        ({"seed": torch.zeros((), dtype=torch.long, device="meta")}, ValueError, "seed must be on cpu, as the data"),
        ({"seed": 1 << 63}, ValueError, "seed must fit in int64, got 9223372036854775808"),
        ({"seed": 0.5}, TypeError, "seed must be a 0-dim int64 tensor or an int, got float"),
    ],
)
def test_sample_errors(change, error, message):
    inputs = {"order": torch.arange(9), "offsets": torch.tensor([0, 9]), "k": 2, "seed": 0} | change
    with pytest.raises(error, match=message):
        sample(**inputs)


def test_other_errors():
    rows = torch.arange(4)
    with pytest.raises(TypeError, match="wrong must be bool, got torch.float32"):
        sample_hard_easy(rows, torch.tensor([0, 4]), 2, torch.ones(4), seed=0)
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        sample_positives(rows, rows, rows, -1, seed=0)
    with pytest.raises(ValueError, match="self_pos must have 4 elements, as pos_start, got 3"):
        sample_positives(rows, rows, rows[:3], 2, seed=0)
    with pytest.raises(TypeError, match="pos_end must be int32 or int64, got torch.float32"):
        sample_positives(rows, rows.float(), rows, 2, seed=0)
    with pytest.raises(TypeError, match="counter must be int32 or int64, got torch.float32"):
        philox(0, rows.float())
    for option in ({"per_image": "no"}, {"num_classes": True}, {"region_size": "8"}, {"ignore_index": None}):
        ((name, value),) = option.items()
        with pytest.raises(TypeError, match=f"{name} must be .*, got {value!r}"):
            sample_anchors(torch.zeros(1, 4, 4, dtype=torch.int64), 2, **{"num_classes": 3, **option})


def test_sample_is_a_named_pair():
    got = sample(torch.arange(3), torch.tensor([0, 3]), 2, seed=0)
    assert isinstance(got, Sample) and got._fields == ("order", "offsets")
