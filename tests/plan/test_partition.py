"""Intervals against a plain construction in Python, for any labels and regions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcloss.losses.cells import against_cells, cells_of_regions
from hpcloss.plan.labels import is_ignored
from hpcloss.plan.partition import (
    Intervals,
    class_sort,
    one_to_one,
    paired,
    partition,
    partition_against,
)
from hpcloss.plan.regions import Grid, grid_regions, grid_shape, region_shape
from hpcloss.plan.sorting import INT32_MAX, index_dtype, segment_bounds
from tests.tools.cases import choice, implementations, integers, tensors_of

FAST = settings(max_examples=80, deadline=None, database=None, derandomize=True)
pixel_labels = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 7, -4, 255, 2**40]), st.integers(-1, 4)), max_size=40)


@pytest.fixture(scope="module", autouse=True, params=["native", "cuda", "torch"])
def implementation(request):
    """Everything here holds for the native library, for its CUDA sources and for the PyTorch implementation alike."""
    yield from implementations(request.param)


def plain_plan(labels, regions, num_regions, background, ignore_index, num_classes=None):
    """Order and intervals as the text of `Pairs` says them, by sorting tuples."""

    def dead(i):
        outside = num_classes is not None and not 0 <= labels[i] < num_classes
        return labels[i] in ignore_index or not 0 <= regions[i] < num_regions or outside

    live = [i for i in range(len(labels)) if not dead(i)]
    order = sorted(live, key=lambda i: (regions[i], labels[i] != background, labels[i], i))
    plan = {"order": order, "pos_start": [], "pos_end": [], "self_pos": list(range(len(order)))}
    for i in order:
        same = [row for row, j in enumerate(order) if (regions[j], labels[j]) == (regions[i], labels[i])]
        plan["pos_start"].append(same[0])
        plan["pos_end"].append(same[-1] + 1)
    first = 0
    plan |= {"anchor_start": [], "anchor_end": [], "key_start": [], "key_end": []}
    for region in range(num_regions):
        members = [i for i in order if regions[i] == region]
        plan["key_start"].append(first)
        plan["anchor_start"].append(first + sum(labels[i] == background for i in members))
        first += len(members)
        plan["anchor_end"].append(first)
        plan["key_end"].append(first)
    return plan


def assert_plan(pairs, plan):
    live = len(plan["order"])
    assert pairs.live().tolist() == [live]
    found = {"order": pairs.order, **pairs.intervals._asdict()}
    for name, values in found.items():
        assert values.dtype == torch.int32, name
        assert values[: len(plan[name])].tolist() == plan[name], name
    assert all(len(found[name]) == len(plan[name]) for name in Intervals._fields[3:])
    # The dead tail holds every other pixel once and no positive.
    assert sorted(pairs.order.tolist()) == list(range(len(pairs.order)))
    assert (pairs.intervals.pos_start[live:] == pairs.intervals.pos_end[live:]).all()


@FAST
@given(pixel_labels, st.sampled_from([None, 0, 2, 99]), st.sampled_from([(), (255,), (1, -4)]))
def test_intervals(pixels, background, ignore_index):
    labels, regions = [label for label, _ in pixels], [region for _, region in pixels]
    pairs = partition(
        torch.tensor(labels, dtype=torch.int64), torch.tensor(regions, dtype=torch.int64), 4,
        background=background, ignore_index=ignore_index,
    )  # fmt: skip
    assert_plan(pairs, plain_plan(labels, regions, 4, background, ignore_index))


@FAST
@given(
    pixel_labels, st.sampled_from([None, 0, 2, 3, 99]), st.sampled_from([(), (255,), (1,)]), st.sampled_from([1, 3, 4])
)
def test_intervals_with_num_classes(pixels, background, ignore_index, num_classes):
    labels, regions = [label for label, _ in pixels], [region for _, region in pixels]
    pairs = partition(
        torch.tensor(labels, dtype=torch.int64), torch.tensor(regions, dtype=torch.int64), 4,
        background=background, ignore_index=ignore_index, num_classes=num_classes,
    )  # fmt: skip
    assert_plan(pairs, plain_plan(labels, regions, 4, background, ignore_index, num_classes))


@pytest.mark.parametrize("background", [None, 0, 2, 3])
def test_the_two_sorts_give_the_same_plan_to_the_bit(background):
    labels, regions = integers(4, 500), integers(7, 500)
    one = partition(labels, regions, 7, background=background, num_classes=4)
    two = partition(labels, regions, 7, background=background)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(two), strict=True))


@pytest.mark.parametrize("background", [None, 1])
def test_class_sort(background):
    labels, regions = choice([0, 1, 2, 3, -1, 255], 60), integers(5, 60)
    rows = class_sort(labels, regions, 4, background=background, ignore_index=(255, -1), num_classes=3)
    assert len(rows.offsets) == 4 * 3 + 1
    rank = [1, 0, 2] if background == 1 else [0, 1, 2]
    for region, position in itertools.product(range(4), range(3)):
        own = slice(int(rows.offsets[region * 3 + position]), int(rows.offsets[region * 3 + position + 1]))
        expected = ((labels == rank[position]) & (regions == region)).nonzero().view(-1).tolist()
        assert rows.order[own].tolist() == expected
    assert int(rows.outside) == int((labels == 3).sum()) > 0
    assert (rows.num_classes, rows.background_first) == (3, background is not None)
    expected = partition(labels, regions, 4, background=background, ignore_index=(255, -1), num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(rows.pairs()), tensors_of(expected), strict=True))


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    ("spatial", "size"),
    [((7,), (3,)), ((6, 7), (4, 4)), ((6, 7), (6, 7)), ((5, 4, 6), (2, 4, 4)), ((3, 2, 2, 3), (2,) * 4)],
)
def test_a_grid_is_its_ids(spatial, size, per_image, num_classes):
    labels = choice([0, 1, 2, 255], 3, *spatial)
    grid = Grid(3, spatial, size, per_image)
    ids, number = grid_regions(3, spatial, size, per_image=per_image)
    assert grid.num_regions() == number and torch.equal(grid.ids(labels.device), ids)
    options = {"background": 0, "ignore_index": (255,), "num_classes": num_classes}
    by_grid, by_ids = partition(labels, grid, **options), partition(labels, ids, number, **options)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(by_grid), tensors_of(by_ids), strict=True))


@pytest.mark.parametrize("background", [None, 0])
def test_counts_anchors_and_regions(background):
    labels, regions = choice([0, 1, 1, 2, 255], 50), integers(6, 50)
    pairs = partition(labels, regions, 5, background=background, ignore_index=(255,))
    positives, negatives = pairs.intervals.counts()
    alive = (labels != 255) & (regions < 5)
    together = (regions[:, None] == regions) & alive[:, None] & alive & ~torch.eye(50, dtype=torch.bool)
    anchor = alive & (labels != background if background is not None else True)
    same = labels[:, None] == labels
    order = pairs.order.long()
    assert torch.equal(positives.long(), ((together & same).sum(1) * anchor)[order])
    assert torch.equal(negatives.long(), ((together & ~same).sum(1) * anchor)[order])
    assert torch.equal(pairs.intervals.counted(), positives > 0) and bool(pairs.intervals.counted().any())
    assert torch.equal(pairs.intervals.counted(need_negatives=True), (positives > 0) & (negatives > 0))
    assert torch.equal(pairs.intervals.is_anchor(), anchor[order])
    assert torch.equal(
        pairs.intervals.region()[pairs.intervals.is_anchor()].long(), regions[order][pairs.intervals.is_anchor()]
    )
    assert len(pairs.intervals) == 7 and pairs.intervals[0] is pairs.intervals.pos_start


def test_head_drops_the_dead_tail_only():
    labels = choice([0, 1, 255], 30)
    pairs = partition(labels, ignore_index=(255,))
    live = int(pairs.live())
    short = pairs.head(live)
    assert (
        len(short.order)
        == len(short.intervals.pos_start)
        == len(short.intervals.pos_end)
        == len(short.intervals.self_pos)
        == live
        < 30
    )
    assert torch.equal(short.order, pairs.order[:live]) and torch.equal(
        short.intervals.key_end, pairs.intervals.key_end
    )


def test_one_region_is_the_default():
    labels = integers(3, 20)
    default, named = partition(labels), partition(labels, torch.zeros(20), 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(default), tensors_of(named), strict=True))


def test_any_integer_is_a_label():
    """The lowest of all is no background, and the widest range is no overflow."""
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    small = choice([0, 1, 2, 3], 60)
    for values in ([lowest, 0, 5, highest], [lowest, lowest + 1, lowest + 2, lowest + 3], [-7, 0, 3, 9]):
        labels = torch.tensor(values)[small]
        for background in (None, *values):
            rank = None if background is None else values.index(background)
            found, right = partition(labels, background=background), partition(small, background=rank)
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(right), strict=True))


def test_every_map_of_four_pixels():
    """All labels of three, one of which is ignored, in all regions of two."""
    pixels = list(itertools.product([torch.iinfo(torch.int64).min, 0, 255], [0, 1]))
    for chosen in itertools.product(pixels, repeat=4):
        labels, regions = [label for label, _ in chosen], [region for _, region in chosen]
        for background in (None, 0):
            pairs = partition(
                torch.tensor(labels), torch.tensor(regions), 2, background=background, ignore_index=(255,)
            )
            assert_plan(pairs, plain_plan(labels, regions, 2, background, (255,)))


def assert_sorted(labels, regions, num_regions, background=None, ignore_index=()):
    """As `assert_plan`, for many pixels: an order found by numpy, and classes as runs of it."""
    pairs = partition(labels, regions, num_regions, background=background, ignore_index=ignore_index)
    label, region = labels.numpy(), regions.numpy()
    dead = np.isin(label, ignore_index) | (region < 0) | (region >= num_regions)
    order = np.lexsort((np.where(dead, 0, label), (label != background) & ~dead, np.where(dead, num_regions, region)))
    live, rows = int((~dead).sum()), np.arange(len(label))
    assert (pairs.order.numpy() == order).all() and (pairs.intervals.self_pos.numpy() == rows).all()
    named = np.stack([region, label])[:, order[:live]]
    starts = np.flatnonzero(np.r_[True, (named[:, 1:] != named[:, :-1]).any(0)]) if live else rows[:0]
    lengths = np.diff(np.r_[starts, live])
    at = Intervals(*[bound.numpy() for bound in pairs.intervals])
    assert (at.pos_start == np.r_[np.repeat(starts, lengths), 0 * rows[live:]]).all()
    assert (at.pos_end == np.r_[np.repeat(starts + lengths, lengths), 0 * rows[live:]]).all()
    ends = np.searchsorted(region[order[:live]], np.arange(num_regions), side="right")
    key_starts = np.r_[0, ends[:-1]]
    of_background = np.bincount(region[~dead & (label == background)], minlength=num_regions)
    assert (at.key_start == key_starts).all() and (at.key_end == ends).all()
    assert (at.anchor_start == key_starts + of_background).all() and (at.anchor_end == ends).all()
    return pairs


@pytest.mark.parametrize("background", [None, 0, 70_000])
def test_many_distinct_labels(background):
    """More than 70 000, near each other and far apart, some of them ignored; and as many regions as pixels."""
    n = 100_000
    labels = torch.randperm(n) % 80_000
    assert len(labels.unique()) == 80_000
    for spread in (1, 10**14):
        chosen = background and background * spread
        assert_sorted(labels * spread, integers(5, n), 4, chosen, (spread, 79_000 * spread))
    assert_sorted(labels, torch.randperm(n), n, background)


def test_more_pixels_than_the_first_kernel_has_blocks_for():
    """From 524 289 pixels on a block of the CUDA sources sorts several tiles."""
    n = 530_001
    assert_sorted(choice([0, 1, 2, 255, 2**62], n), integers(300, n), 299, 0, (255,))


def test_one_pixel_and_none_left():
    for label, background in itertools.product((0, -(2**63), 2**63 - 1), (None, 0)):
        one, region = torch.tensor([label]), torch.tensor([0])
        assert_sorted(one, region, 1, background)
        assert_sorted(one, region, 1, background, (label,))
        assert_sorted(one, region - 1, 3, background)
    many = choice([255, -1], 3000)
    pairs = assert_sorted(many, integers(3, 3000), 3, 0, (255, -1))
    assert pairs.live().tolist() == [0] and pairs.order.tolist() == list(range(3000))


def test_names_of_classes_do_not_matter():
    """Other numbers for the same classes: each pixel keeps its positives."""
    labels, regions = integers(6, 3000), integers(4, 3000)

    def members(labels):
        pairs = partition(labels, regions, 4)
        starts, ends, order = pairs.intervals.pos_start.tolist(), pairs.intervals.pos_end.tolist(), pairs.order.tolist()
        # Those of one class stand in the order of their pixels.
        return sorted((pixel, tuple(order[starts[row] : ends[row]])) for row, pixel in enumerate(order))

    expected = members(labels)
    for names in ([5, 3, 1, 0, 2, 4], [2**63 - 1, -(2**63), 7, -1, 10**15, 0]):
        assert members(torch.tensor(names)[labels]) == expected


@pytest.mark.parametrize(
    ("regions", "number", "message"),
    [
        (Grid(1, (6, 6), (2, 2)), 1, r"one pixel for each of 35 labels, got Grid\(batch=1, spatial=\(6, 6\)"),
        (Grid(1, (7, 5), (2,)), 1, "regions must have a size of at least 1 on every axis"),
        (Grid(1, (7, 5), (2, 0)), 1, "regions must have a size of at least 1 on every axis"),
        (torch.zeros(34), 1, "regions must have one id for each of 35 labels, got 34"),
        (None, 0, "num_regions must be at least 1, got 0"),
    ],
)
def test_regions_that_do_not_fit(regions, number, message):
    for num_classes in (None, 3):
        with pytest.raises(ValueError, match=message):
            partition(torch.zeros(35, dtype=torch.int64), regions, number, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_no_pixels(num_classes):
    pairs = partition(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 2, background=0, num_classes=num_classes)
    assert len(pairs.order) == 0 and pairs.intervals.key_end.tolist() == [0, 0] and pairs.live().tolist() == [0]
    assert all(len(values) == 0 for values in pairs.intervals.counts())


@FAST
@given(
    st.lists(st.sampled_from([0, 1, 5, 255, 2**62]), max_size=20),
    st.lists(st.sampled_from([0, 1, 3, 255]), max_size=20),
)
def test_against_other_keys(labels, key_labels):
    pairs, key_order = partition_against(
        torch.tensor(labels, dtype=torch.int64), torch.tensor(key_labels, dtype=torch.int64), ignore_index=(255,)
    )
    live = sum(label != 255 for label in key_labels)
    ranked = [key_labels[j] for j in key_order.tolist()]
    assert sorted(key_order.tolist()) == list(range(len(key_labels))) and 255 not in ranked[:live]
    anchors = sum(label != 255 for label in labels)
    assert pairs.live().tolist() == [anchors] and pairs.intervals.anchor_start.tolist() == [0]
    assert (pairs.intervals.key_start.tolist(), pairs.intervals.key_end.tolist()) == ([0], [live])
    assert (pairs.intervals.self_pos == -1).all()
    positives, negatives = pairs.intervals.counts()
    for row, pixel in enumerate(pairs.order.tolist()):
        mine = range(int(pairs.intervals.pos_start[row]), int(pairs.intervals.pos_end[row]))
        if row < anchors:
            assert list(mine) == [j for j in range(live) if ranked[j] == labels[pixel]]
            assert (int(positives[row]), int(negatives[row])) == (len(mine), live - len(mine))
        else:
            assert labels[pixel] == 255 and positives[row] == negatives[row] == 0
    assert all(bound.dtype == torch.int32 for bound in tensors_of(pairs))


sorted_labels = st.lists(st.tuples(st.sampled_from([0, 1, 2, 255]), st.integers(0, 2)), max_size=20)


@FAST
@given(sorted_labels, sorted_labels, st.sampled_from([None, 0, 2]))
def test_against_other_keys_by_region_and_class(anchors, keys, background):
    def sort(pixels):
        labels, regions = (torch.tensor([pixel[i] for pixel in pixels], dtype=torch.int64) for i in (0, 1))
        return class_sort(labels, regions, 3, background=background, ignore_index=(255,), num_classes=3)

    mine, other = sort(anchors), sort(keys)
    pairs = mine.against(other)
    positives, negatives = pairs.intervals.counts()
    is_anchor = pairs.intervals.is_anchor().tolist()
    met = [keys[j] for j in other.order.tolist()]
    for row, pixel in enumerate(pairs.order.tolist()):
        label, region = anchors[pixel]
        assert is_anchor[row] == (label not in (255, background))
        if is_anchor[row]:
            same = [j for j, key in enumerate(met) if key == (label, region)]
            assert list(range(int(pairs.intervals.pos_start[row]), int(pairs.intervals.pos_end[row]))) == same
            inside = [j for j, key in enumerate(met) if key[1] == region and key[0] != 255]
            assert list(range(int(pairs.intervals.key_start[region]), int(pairs.intervals.key_end[region]))) == inside
            assert (int(positives[row]), int(negatives[row])) == (len(same), len(inside) - len(same))
    assert (pairs.intervals.self_pos == -1).all() and all(bound.dtype == torch.int32 for bound in tensors_of(pairs))


def test_explicit_positives():
    pairs = one_to_one(4, torch.device("cpu"))
    assert pairs.order.tolist() == pairs.intervals.pos_start.tolist() == [0, 1, 2, 3]
    assert pairs.intervals.pos_end.tolist() == [1, 2, 3, 4]
    positives, negatives = pairs.intervals.counts()
    assert positives.tolist() == [1] * 4 and negatives.tolist() == [3] * 4
    own = paired(partition(torch.tensor([0, 1, 0, 1])), torch.tensor([1, 0, 3, 2])).intervals
    assert own.pos_start.tolist() == [1, 0, 3, 2] and own.pos_end.tolist() == [2, 1, 4, 3]
    positives, negatives = own.counts()
    assert positives.tolist() == [1] * 4 and negatives.tolist() == [2] * 4


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("background", [None, 0])
def test_against_cells(per_image, background):
    batch, spatial, size, local = 2, (7, 6), (4, 6), (2, 3)
    labels = choice([0, 1, 2, -9, 255], batch * 42)
    region, number = grid_regions(batch, spatial, size, per_image=per_image)
    cell, cells = grid_regions(batch, spatial, local, per_image=per_image)
    pairs = partition(labels, region, number, background=background, ignore_index=(255,))
    keys = partition(labels, cell, cells, background=background, ignore_index=(255,))
    met = torch.zeros(len(labels), dtype=torch.int64)
    grids = [Grid(batch, spatial, cell_size, per_image) for cell_size in (size, local)]
    for of_region in cells_of_regions(torch.arange(number), *grids):
        order, at = against_cells(pairs, keys, of_region, labels, background)
        positives, negatives = at.counts()
        for row in at.is_anchor().nonzero().view(-1).tolist():
            pixel, met_cell = int(order[row]), int(of_region[region[order[row]]])
            here = [j for j in keys.order.tolist() if cell[j] == met_cell and labels[j] != 255]
            inside = range(int(at.key_start[region[pixel]]), int(at.key_end[region[pixel]]))
            assert [int(keys.order[j]) for j in inside] == here
            same = [int(keys.order[j]) for j in range(int(at.pos_start[row]), int(at.pos_end[row]))]
            assert same == [j for j in here if labels[j] == labels[pixel]]
            assert int(keys.order[at.self_pos[row]]) == pixel
            assert int(positives[row]) == len(set(same) - {pixel})
            assert int(negatives[row]) == len(here) - len(same)
            met[pixel] += len(here)
    anchors = pairs.order[pairs.intervals.is_anchor()].long()
    together = (region[:, None] == region) & (labels != 255)
    assert torch.equal(met[anchors], together.sum(1)[anchors])  # the cells of a region make it up


def test_is_ignored():
    labels = torch.tensor([-100, -1, 0, 1, 2, 255])
    assert is_ignored(labels, ()).sum() == 0
    assert is_ignored(labels, (-1, 255)).tolist() == [False, True, False, False, False, True]
    assert is_ignored(labels, (1,), 2).tolist() == [True, True, False, True, True, True]


@FAST
@given(st.lists(st.booleans(), max_size=12))
def test_segment_bounds(starts):
    starts = torch.tensor([True, *starts])
    begin, end = segment_bounds(starts)
    number = starts.cumsum(0)
    for row in range(len(starts)):
        members = (number == number[row]).nonzero().view(-1)
        assert (int(begin[row]), int(end[row])) == (int(members[0]), int(members[-1]) + 1)
    assert [len(x) for x in segment_bounds(starts[:0])] == [0, 0]


def test_index_dtype():
    assert index_dtype(INT32_MAX) == torch.int32 and index_dtype(INT32_MAX + 1) == torch.int64


# ---------------------------------------------------------------------------------------------------------- regions


def test_region_shape():
    assert region_shape(3, (7, 6)) == (3, 3) and region_shape([2, 5, 1], (9, 9, 9)) == (2, 5, 1)
    assert region_shape(None, (7, 0, 6)) == (7, 1, 6)
    with pytest.raises(ValueError, match=r"region_size must have one value per spatial axis \(2\), got \(1, 2, 3\)"):
        region_shape((1, 2, 3), (7, 6))


@pytest.mark.parametrize("spatial,size", [((13,), (4,)), ((7, 6), (3, 6)), ((7, 6), (100, 1)), ((3, 4, 5), (2, 3, 2))])
@pytest.mark.parametrize("per_image", [False, True])
def test_grid_regions(spatial, size, per_image):
    cells = grid_shape(spatial, size)
    assert cells == tuple(math.ceil(extent / cell) for extent, cell in zip(spatial, size, strict=True))
    ids, number = grid_regions(2, spatial, size, per_image=per_image)
    assert number == math.prod(cells) * (2 if per_image else 1)
    grid = list(itertools.product(*map(range, cells)))
    for pixel, (image, *place) in enumerate(itertools.product(range(2), *map(range, spatial))):
        cell = grid.index(tuple(p // s for p, s in zip(place, size, strict=True)))
        assert int(ids[pixel]) == cell + per_image * image * len(grid)
