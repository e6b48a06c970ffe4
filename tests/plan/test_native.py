"""The native library: integers of the PyTorch implementation, errors with names, threads; what is said without it."""

import contextlib
import ctypes
import multiprocessing
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hpcloss
from hpcloss.plan import draw, native, partition, sorting
from hpcloss.plan.regions import Grid
from hpcloss.plan.sampling import sample, sample_anchors, sample_hard_easy
from tests.tools.cases import ROOT, choice, cuda_on_cpu, integers, tensors_of

needs_library = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu"))
needs_gnu = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")
seeds = st.integers(-(2**63), 2**63 - 1)


def same(found, expected):
    """Same values, dtypes and shapes, tensor by tensor."""
    found, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (found, expected))
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_library_is_there_where_there_is_a_compiler():
    """What this suite installs is built; a silent fallback would leave the library untested."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert native.why_not("cpu") == ""
    assert "native library: available" in hpcloss.info()


# ---------------------------------------------------------------------------- bit for bit, over 1,000 cases


@st.composite
def label_maps(draw):
    """Labels with ignored ones and strays, of each integer dtype, and regions of each kind."""
    spatial = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    dtype = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    num_classes = draw(st.sampled_from([1, 2, 4, 256]))
    values = [*range(min(num_classes, 6)), num_classes - 1, 255, 7]
    values += [] if dtype == torch.uint8 else [-100, -1, 2**31 - 1] + ([2**40] if dtype == torch.int64 else [])
    labels = choice(values, batch, *spatial, seed=seed).to(dtype)
    if draw(st.booleans()):
        regions = Grid(batch, spatial, tuple(draw(st.integers(1, 8)) for _ in spatial), draw(st.booleans()))
        return labels, regions, regions.num_regions(), num_classes
    number = draw(st.integers(1, 4))
    ids = choice(range(-1, number + 1), labels.numel(), seed=seed + 1)
    return labels, ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), number, num_classes


@needs_library
@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(label_maps(), st.sampled_from([None, 0, 1, 99]), st.sampled_from([(), (255,), (-100, -1, 255), (1, 7)]))
def test_partitions(case, background, ignore_index):
    labels, regions, number, num_classes = case
    ids = regions.ids(labels.device) if isinstance(regions, Grid) else regions.long()
    options = {"background": background, "ignore_index": ignore_index}
    rows = partition.class_sort(labels, regions, number, num_classes=num_classes, **options)
    flat, ignored = labels.reshape(-1), list(ignore_index)
    same(tensors_of(rows), sorting._class_sort_in_torch(flat, ids, number, num_classes, background, ignored))
    pairs = partition.partition(labels, regions, number, **options)
    same(tensors_of(pairs), sorting._label_sort_in_torch(flat, ids, number, background, ignored))
    first, pairs = rows.background_first, rows.pairs()
    same(pairs.intervals, sorting._class_intervals_in_torch(rows.offsets, len(rows.order), num_classes, first))
    counts = pairs.intervals.counts()
    same(counts, sorting._pair_counts_in_torch(*pairs.intervals))
    counted = [pairs.intervals.counted(), pairs.intervals.counted(need_negatives=True)]
    same(counted, [counts[0] > 0, torch.minimum(*counts) > 0])


@st.composite
def plans(draw):
    """Intervals of any length over shuffled pixels, with dead rows at both ends."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 9, 70, 1500]), min_size=1, max_size=6))
    lead, tail = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    n = lead + sum(lengths) + tail
    offsets = torch.tensor([lead, *lengths]).cumsum(0)
    order = torch.randperm(n) if draw(st.booleans()) else torch.arange(n)
    return order.to(draw(st.sampled_from([torch.int32, torch.int64]))), offsets.int()


@needs_library
@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(plans(), st.sampled_from([1, 2, 5, 64, 1000, 4096]), seeds, st.sampled_from(native.KINDS), st.booleans())
def test_samples(plan, k, seed, kind, ties):
    order, offsets = plan
    assume(len(order))
    n, seed = len(order), torch.tensor(seed)
    values = {
        "uniform": None,
        "weighted": choice([0.0, 1e-30, 0.5, 1.0, 3e38, float("inf"), float("nan"), -1.0], n),
        "hardest": choice([0.0, -0.0, 1.0, float("nan")], n) if ties else torch.rand(n),
        "hard_easy": torch.rand(n) < 0.3,
    }[kind]
    found = torch.ops.hpcloss.sample(order, offsets, k, kind, values, n, seed)
    same(found, draw._sample_in_torch(order, offsets, k, kind, values, n, seed))


@needs_library
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 30), st.sampled_from([1, 2, 3, 9, 40]), seeds, st.sampled_from([torch.int32, torch.int64]))
def test_positives(n, k, seed, dtype):
    start = torch.randint(0, 50, (n,)).to(dtype)
    bounds = (start, start + torch.randint(-1, 30, (n,)).to(dtype), torch.randint(-1, 80, (n,)).to(dtype))
    seed = torch.tensor(seed)
    same(torch.ops.hpcloss.sample_positives(*bounds, k, seed), draw._sample_positives_in_torch(*bounds, k, seed))


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_a_guess_that_was_too_low(threads, monkeypatch):
    """Of uniform keys the limit is guessed. Here all are equal, far above it: one pixel named by every row."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n in (5_000, 300_000):
        order, offsets = torch.full((n,), 17, dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
        for seed in range(3):
            arguments = (order, offsets, 6, "uniform", None, n, torch.tensor(seed))
            same(torch.ops.hpcloss.sample(*arguments), draw._sample_in_torch(*arguments))


@needs_library
@pytest.mark.parametrize("kind", native.KINDS)
def test_samples_of_a_size_that_is_cut_into_parts(kind, monkeypatch):
    """One giant interval, tiny ones and dead rows; more threads than there are cores."""
    n = 400_000
    labels = choice([0] * 30 + [1, 2, 3, 255], n)
    values = {"uniform": None, "hard_easy": torch.rand(n) < 1e-3}.get(kind, torch.rand(n))
    rows = partition.class_sort(labels, num_classes=5)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        same(tensors_of(partition.class_sort(labels, num_classes=5)), tensors_of(rows))
        results.append(torch.ops.hpcloss.sample(rows.order, rows.offsets, 300, kind, values, n, torch.tensor(5)))
    same(results[0], draw._sample_in_torch(rows.order, rows.offsets, 300, kind, values, n, torch.tensor(5)))
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.fixture
def emulated(monkeypatch):
    """The functions of `native`, by the CUDA sources."""
    library, call = cuda_on_cpu(), native._call_cuda
    monkeypatch.setattr(native, "_call", lambda *rest: call(library, *rest[:3], (*rest, None)[3], 0))
    return library


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("patch", [1, 7, 100])
def test_a_partition_of_several_tiles_on_the_emulated_gpu(emulated, patch, dtype):
    """Blocks of 2 048 pixels, four warps each; labels that change at every pixel, now and then, and seldom."""
    n = 7000
    for seed in range(6):
        labels = choice([0, 1, 2, 3, 9, 255], -(-n // patch), seed=seed).repeat_interleave(patch)[:n]
        emulated.hpcloss_emulator_seed(ctypes.c_ulonglong(seed))
        found = native.class_sort(labels, None, [n], [900], False, 8, range(4), 2, [255], dtype)
        ids = torch.arange(n) // 900
        order, offsets, outside = sorting._class_sort_in_torch(labels, ids, 8, 4, 2, [255])
        same(found, (order.to(dtype), offsets.to(dtype), outside))


@pytest.mark.parametrize("kind", native.KINDS)
@pytest.mark.parametrize("k", [1, 300, 1024, 4096])
def test_samples_of_several_parts_on_the_emulated_gpu(emulated, kind, k):
    """Intervals that end inside parts, at their ends, and over several of them; scores in every order."""
    lengths = [5, 8187, 0, 20_000, 1, 13_000, 8192]
    offsets = torch.tensor([3, *lengths]).cumsum(0)
    n = int(offsets[-1]) + 7
    order = torch.randperm(n).int()
    for seed, values in enumerate((torch.rand(n), torch.arange(n).float(), -torch.arange(n).float())):
        emulated.hpcloss_emulator_seed(ctypes.c_ulonglong(seed))
        values = {"uniform": None, "hard_easy": values < 0.2 * values.max()}.get(kind, values)
        found = native.sample(order, offsets.int(), k, kind, values, n, torch.tensor(seed))
        same(found, draw._sample_in_torch(order, offsets.int(), k, kind, values, n, torch.tensor(seed)))


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_int64_indices(threads, monkeypatch):
    """As beyond 2^31 pixels, which do not fit this machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    labels = choice([0, 1, 2, 255], 300_000)
    arguments = (labels, None, [300_000], [70_000], False, 5, range(3), 0, [255])
    narrow, wide = native.class_sort(*arguments, torch.int32), native.class_sort(*arguments, torch.int64)
    assert wide[0].dtype == wide[1].dtype == torch.int64
    assert all(torch.equal(a.long(), b) for a, b in zip(narrow, wide))
    for a, b in zip(*(native.class_intervals(rows[1], 300_000, 3, True) for rows in (narrow, wide))):
        assert torch.equal(a.long(), b) and b.dtype == torch.int64
    assert torch.equal(sample(narrow[0], narrow[1], 9, seed=1).order.long(), sample(wide[0], wide[1], 9, seed=1).order)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 7, 2047, 2048, 2049, 4097, 6144, 10_000])
def test_a_label_sort_of_several_tiles_on_the_emulated_gpu(emulated, n, dtype):
    """Blocks of 2 048 pixels; runs of which one lies wholly before or behind the other, or has no partner."""
    mixed = choice([0, 1, -(2**63), 2**63 - 1, 9, 255], n)
    ascending = torch.arange(n)
    for seed, labels in enumerate((mixed, ascending, -ascending, ascending // 900, torch.zeros(n), ascending % 3)):
        emulated.hpcloss_emulator_seed(ctypes.c_ulonglong(seed))
        for ids, number in ((None, 1), (integers(4, n), 3)):
            found = native.label_sort(labels.long(), ids, [], [], False, number, 1, [255], dtype)
            region = torch.zeros(n, dtype=torch.int64) if ids is None else ids
            expected = sorting._label_sort_in_torch(labels, region, number, 1, [255])
            same(found, [values.to(dtype) for values in expected])


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_int64_indices_of_a_label_sort(threads, monkeypatch):
    """Of labels that are counted, and of labels that are sorted digit by digit."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for labels in (choice([0, 1, 2, 255], 300_000), choice([0, -(2**63), 2**63 - 1, 255], 300_000)):
        arguments = (labels, None, [300_000], [70_000], False, 5, 0, [255])
        narrow, wide = native.label_sort(*arguments, torch.int32), native.label_sort(*arguments, torch.int64)
        assert all(a.dtype == torch.int32 and b.dtype == torch.int64 for a, b in zip(narrow, wide))
        assert all(torch.equal(a.long(), b) for a, b in zip(narrow, wide))


def test_a_partition_of_many_segments_on_the_emulated_gpu(emulated):
    """More segments than one digit counts: two and three passes, and their search for the offsets."""
    labels, seed = choice([0, 1, 2, 5, 255], 9000), 0
    for num_regions, num_classes in ((9000, 2), (3000, 6), (9000, 800)):
        ids = integers(num_regions, 9000)
        arguments = (labels, ids, [], [], False, num_regions, range(num_classes), 1, [255], torch.int32)
        expected = sorting._class_sort_in_torch(labels, ids, num_regions, num_classes, 1, [255])
        emulated.hpcloss_emulator_seed(ctypes.c_ulonglong(seed := seed + 1))
        same(native.class_sort(*arguments), expected)


# ---------------------------------------------------------------------------- sample_anchors


def test_anchors_of_each_image_and_class():
    labels = choice([0, 1, 2, 255, -1, 9], 3, 20, 20)
    order, offsets = sample_anchors(labels, 5, num_classes=4, seed=3)
    assert len(order) == 3 * 4 * 5 and len(offsets) == 3 * 4 + 1
    for segment in range(12):
        image, label = divmod(segment, 4)
        drawn = order[offsets[segment] : offsets[segment + 1]].tolist()
        pixels = [image * 400 + p for p in (labels[image].reshape(-1) == label).nonzero().view(-1).tolist()]
        assert len(drawn) == min(5, len(pixels)) and set(drawn) <= set(pixels) and drawn == sorted(set(drawn))
    assert (order[offsets[-1] :] == 0).all()


def test_anchors_by_each_rule():
    labels = choice([0, 1], 2, 8, 8)
    scores = torch.rand(2, 8, 8)
    order, offsets = sample_anchors(labels, 3, num_classes=2, region_size=4, per_image=False, scores=scores)
    grid = Grid(2, (8, 8), (4, 4)).ids(labels.device)
    for segment in range(8):
        region, label = divmod(segment, 2)
        member = (grid == region) & (labels.reshape(-1) == label)
        best = scores.reshape(-1).masked_fill(~member, -1).topk(min(3, int(member.sum()))).indices
        assert order[offsets[segment] : offsets[segment + 1]].tolist() == sorted(best.tolist())
    weights = (torch.arange(64) % 2 == 0).float().expand(2, 64).reshape(2, 8, 8).contiguous()
    order, offsets = sample_anchors(labels, 99, num_classes=2, weights=weights)
    assert sorted(order[: offsets[-1]].tolist()) == list(range(0, 128, 2))
    wrong = scores < 0.5
    order, offsets = sample_anchors(labels, 4, num_classes=2, wrong=wrong)
    assert [int(wrong.reshape(-1)[order[a:b]].sum()) for a, b in zip(offsets[:-1], offsets[1:])] == [2] * 4


def test_anchors_follow_torchs_seed_and_their_own():
    labels = choice([0, 1], 2, 30, 30)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sample_anchors(labels, 7, num_classes=2).order)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    same(
        sample_anchors(labels, 7, num_classes=2, seed=4), sample_anchors(labels, 7, num_classes=2, seed=torch.tensor(4))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 2.5}, TypeError, "k must be an integer, got 2.5"),
        ({"k": 2**62}, ValueError, r"k must be at least 1 and below 2\^31, got 46"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer, got 2.0"),
        ({"num_classes": 256}, ValueError, "num_classes must be at most 255 with the default ignore_index, .* got 256"),
        ({"ignore_index": 2**64}, ValueError, "ignore_index must fit in int64, got 18446744073709551616"),
        ({"scores": torch.zeros(2, 3, device="meta")}, ValueError, "scores must be on cpu, as labels, got meta"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have shape \[B, \*S\], got \[3\]"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"region_size": 0}, ValueError, "region_size must be at least 1 on every axis, got 0"),
        ({"region_size": (2, 2)}, ValueError, "region_size must have one value per spatial axis"),
        ({"weights": torch.rand(3, 3)}, ValueError, r"weights must have shape \[2, 3\], as labels, got \[3, 3\]"),
        ({"weights": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "weights must be floating"),
        ({"wrong": torch.rand(2, 3)}, TypeError, "wrong must be bool"),
        ({"weights": torch.rand(2, 3), "scores": torch.rand(2, 3)}, ValueError, "at most one of weights and scores"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an integer"),
        ({"seed": 0.5}, TypeError, "seed must be"),
    ],
)
def test_anchor_errors(change, error, message):
    arguments = {"labels": torch.zeros(2, 3, dtype=torch.int64), "k": 2, "num_classes": 2} | change
    with pytest.raises(error, match=message):
        sample_anchors(arguments.pop("labels"), arguments.pop("k"), **arguments)


# ---------------------------------------------------------------------------- errors


@needs_library
def test_bad_data_raise_exceptions_with_names():
    order = torch.arange(10)
    for offsets in ([0, 5, 3], [0, 11], [-1, 5]):
        with pytest.raises(native.OffsetsError, match="hpcloss_sample: offsets descend or leave the rows"):
            sample(order, torch.tensor(offsets), 2, seed=0)
        with pytest.raises(ValueError):
            torch.ops.hpcloss.class_intervals(torch.tensor(offsets), 10, len(offsets) - 1, False)
    for maps in ({"weights": torch.ones(9)}, {"scores": torch.ones(9)}, {"num_pixels": 9}):
        with pytest.raises(native.PixelError, match="order names a pixel beyond the map"):
            sample(order, torch.tensor([0, 10]), 2, seed=0, **maps)
    with pytest.raises(IndexError):
        sample_hard_easy(order - 3, torch.tensor([0, 10]), 2, torch.ones(10, dtype=torch.bool), seed=0)


def raw(name, *arguments):
    """The error code of a function of the library, threads included."""
    return getattr(native._find().library, name)(*arguments)


@needs_library
def test_every_function_checks_its_arguments():
    """By position in the C header; 1 null, 2 size, 3 type, 4 offsets."""
    long, n = ctypes.c_int64, 6
    data = [torch.zeros(64, dtype=torch.int32) for _ in range(10)]
    labels, order, offsets, outside, seed = (torch.zeros(64, dtype=torch.int64) for _ in range(5))
    pointer = [ctypes.c_void_p(x.data_ptr()) for x in data]
    p_labels, p_order, p_offsets, p_outside, p_seed = (
        ctypes.c_void_p(x.data_ptr()) for x in (labels, order, offsets, outside, seed)
    )

    def grid(ids=None, ids_type=2, axes=2, extent=(2, 3, 0), cell=(1, 2, 0), per_image=0):
        made = native.Regions(ids, ids_type, axes, (long * 3)(*extent), (long * 3)(*cell), per_image)
        return ctypes.byref(made)

    none = ctypes.c_void_p(None)
    sort = [p_labels, 2, long(n), grid(), long(4), long(0), long(3), long(-1), none, long(0), p_order, p_offsets, 1,
            p_outside, 1]  # fmt: skip
    of_labels = [p_labels, 2, long(n), grid(), long(4), none, none, long(0), p_order, 1, *pointer[:7], 1]
    intervals = [p_offsets, long(2), long(3), 0, long(n), 1, *pointer[:7], 1]
    counts = [*pointer[:7], long(n), long(2), 1, *pointer[7:9], 1]
    counted = [*pointer[:7], long(n), long(2), 1, 1, pointer[7], 1]
    draw = [p_order, p_offsets, 1, long(n), long(2), long(3), 0, none, long(n), p_seed, pointer[0], pointer[1], 1]
    positives = [*pointer[:3], 1, long(n), long(3), p_seed, pointer[3], 1]
    wrong = {
        "hpcloss_class_sort": (sort, {
            0: (none, 1), 1: (3, 3), 2: (long(-1), 2), 3: (none, 1), 4: (long(0), 2), 6: (long(0), 2), 8: (none, 0),
            9: (long(17), 2), 10: (none, 1), 11: (none, 1), 12: (0, 3), 13: (none, 1),
        }),
        "hpcloss_label_sort": (of_labels, {
            0: (none, 1), 1: (3, 3), 2: (long(-1), 2), 3: (none, 1), 4: (long(2**30), 2), 7: (long(17), 2),
            8: (none, 1), 9: (0, 3), 10: (none, 1), 12: (none, 1), 13: (none, 1), 16: (none, 1),
        }),
        "hpcloss_class_intervals": (intervals, {
            0: (none, 1), 1: (long(0), 2), 2: (long(0), 2), 4: (long(-1), 2), 5: (7, 3), 6: (none, 1), 12: (none, 1),
        }),
        "hpcloss_pair_counts": (counts, {
            0: (none, 1), 3: (none, 1), 7: (long(-1), 2), 8: (long(0), 2), 9: (0, 3), 10: (none, 1), 11: (none, 1),
        }),
        "hpcloss_pair_counted": (counted, {
            0: (none, 1), 3: (none, 1), 7: (long(-1), 2), 8: (long(0), 2), 9: (0, 3), 11: (none, 1),
        }),
        "hpcloss_sample": (draw, {
            0: (none, 1), 1: (none, 1), 2: (0, 3), 3: (long(-1), 2), 4: (long(-1), 2), 5: (long(0), 2), 6: (4, 3),
            8: (long(-1), 2), 9: (none, 1), 10: (none, 1), 11: (none, 1),
        }),
        "hpcloss_sample_positives": (positives, {
            0: (none, 1), 2: (none, 1), 3: (0, 3), 4: (long(-1), 2), 5: (long(0), 2), 6: (none, 1), 7: (none, 1),
        }),
    }  # fmt: skip
    for name, (right, changes) in wrong.items():
        assert raw(name, *right) == 0, name
        for position, (value, code) in changes.items():
            changed = [*right]
            changed[position] = value
            assert raw(name, *changed) == code, (name, position)
    for regions, code in (
        (grid(axes=4), 2), (grid(axes=-1), 2), (grid(extent=(2, 4, 0)), 2), (grid(extent=(0, 3, 0)), 2),
        (grid(cell=(0, 1, 0)), 2), (grid(cell=(1, 1, 0)), 2), (grid(extent=(2**62, 2**62, 0)), 2),
        (grid(ids=pointer[0], ids_type=0), 3), (grid(per_image=1), 0), (grid(ids=pointer[0], ids_type=1, axes=9), 0),
    ):  # fmt: skip
        assert raw("hpcloss_class_sort", *sort[:3], regions, *sort[4:]) == code
    assert raw("hpcloss_class_sort", *sort[:4], long(2**30), *sort[5:]) == 2  # segments beyond 2^31
    assert raw("hpcloss_class_sort", *sort[:9], long(1), *sort[10:]) == 1  # an ignored label, and no array of them
    assert raw("hpcloss_sample", *draw[:3], long(2**32), *draw[4:]) == 2
    assert raw("hpcloss_sample", *draw[:6], 1, *draw[7:]) == 1  # weighted without weights
    assert raw("hpcloss_sample", *draw[:4], long(2**62), *draw[5:]) == 2  # the sample itself beyond all memory


def test_errors_have_texts_and_classes():
    for code, kind in ((1, native.NativeError), (4, ValueError), (5, IndexError), (7, MemoryError), (99, RuntimeError)):
        with pytest.raises(kind, match="hpcloss_name: ") as caught:
            native.raise_on(code, "name")
        assert isinstance(caught.value, native.NativeError)
    native.raise_on(0, "name")


# ---------------------------------------------------------------------------- what is found, and what is said if not


@pytest.fixture
def forget():
    """Makes the module look for the library again."""

    def clear():
        native._find.cache_clear()
        native.why_not.cache_clear()

    yield clear
    clear()


def test_a_library_can_be_named(monkeypatch, forget, tmp_path):
    monkeypatch.setenv("HPCLOSS_LIBRARY", "")
    forget()
    assert native.why_not("cpu") == "HPCLOSS_LIBRARY is empty"
    assert "native library: not available, HPCLOSS_LIBRARY is empty" in hpcloss.info()
    labels = choice([0, 1], 2, 4, 4)
    assert len(partition.partition(labels, num_classes=2).order) == 32  # served by the PyTorch implementation
    # One that is named must load: nobody wants to test another one than they think.
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    for name in (tmp_path / "gone.so", broken):
        monkeypatch.setenv("HPCLOSS_LIBRARY", str(name))
        forget()
        with pytest.raises(native.NativeError, match=f"HPCLOSS_LIBRARY=.*{name.name} cannot be loaded"):
            partition.partition(labels, num_classes=2)


@needs_gnu
def test_a_library_of_another_version_is_refused(tmp_path):
    for number, reason in (
        (999, "has ABI version 999, this package needs"),
        (native.ABI, "has no add_transpose, class_sort"),
    ):
        source, library = tmp_path / "old.c", tmp_path / f"old{number}.so"
        source.write_text(f"int hpcloss_abi(void) {{ return {number}; }}")
        subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
        found = native._load(library)
        assert found.library is None and f"old{number}.so {reason}" in found.reason


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [(0, 13000, "there is no CUDA driver"), (12080, 13000, "built for CUDA 13.0, the driver is for 12.8"),
     (13000, 13010, "torch finds no CUDA device"), (14000, 13000, "torch finds no CUDA device")],
)  # fmt: skip
def test_an_old_driver_is_explained(driver, runtime, reason, monkeypatch, forget):
    class Library:
        @staticmethod
        def hpcloss_cuda_versions(of_driver, of_runtime):
            of_driver._obj.value, of_runtime._obj.value = driver, runtime
            return 0

        hpcloss_cuda_probe = None

    forget()
    monkeypatch.setattr(native, "_find", lambda: native._Found(Library, ""))
    native.why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in native.why_not("cuda")
    assert "no functions for device 'mps'" in native.why_not("mps")
    native.why_not.cache_clear()
    monkeypatch.undo()


def test_a_gpu_without_code_for_it_is_explained(monkeypatch, forget):
    class Library:
        hpcloss_cuda_versions = staticmethod(lambda driver, runtime: setattr(driver._obj, "value", 13000))
        hpcloss_cuda_probe = staticmethod(lambda: 8)
        hpcloss_cuda_error = staticmethod(lambda: b"no kernel image")

    forget()
    monkeypatch.setattr(native, "_find", lambda: native._Found(Library, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    assert native.why_not("cuda", 1) == "its kernels do not load on CUDA device 1: no kernel image"
    monkeypatch.setattr(Library, "hpcloss_cuda_probe", staticmethod(lambda: 0))
    assert native.why_not("cuda", 0) == ""
    monkeypatch.undo()


def test_the_emulated_gpu_loads_every_kernel():
    library = cuda_on_cpu()
    assert library.hpcloss_cuda_probe() == 0
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    for kernel in re.findall(r"__global__ void .*?(\w+_kernel)\(", sources):
        assert sources.count(f"{kernel}<Index>") >= 2, f"{kernel} is not loaded by its probe, or never launched"


def test_importing_the_package_loads_no_library():
    script = "import sys, hpcloss; from hpcloss.plan import native; sys.exit(native._find.cache_info().currsize)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def _in_a_child(order):
    rows = partition.class_sort(choice([0, 1, 2], 300_000), num_classes=3)
    return torch.equal(rows.order, order)


@needs_library
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_children_can_call_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    order = partition.class_sort(choice([0, 1, 2], 300_000), num_classes=3).order
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_in_a_child, [order, order]))
