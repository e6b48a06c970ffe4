"""What happens before and after the pairs: the plan, gather and scatter, samples; against copies of the same bytes."""

from __future__ import annotations

import statistics
import time

import cases
import peers
import pytest
import torch
from fresh import measure
from measure import Bar, Copies, against, assert_close, busy, in_turns, num_threads

import hpcloss
from hpcloss.plan import native
from hpcloss.plan.partition import class_sort, partition
from hpcloss.plan.regions import Grid
from hpcloss.primitives.rows import pack
from hpcloss.primitives.segment_mean import segment_mean

LABELS = (12, 256, 256)
CLASSES, SIZE = 4, 16


@pytest.fixture(scope="module")
def copies():
    return Copies()


@pytest.fixture(scope="module")
def labels():
    return cases.label_patches(*LABELS)


GRID = Grid(LABELS[0], LABELS[1:], (SIZE, SIZE))


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize("num_classes", [None, CLASSES], ids=["any-labels", "num-classes"])
def bench_partition(benchmark, report, copies, labels, num_classes):
    """Sort 12 x 256 x 256 pixels by (region, class) and find the intervals."""

    def plan():
        return partition(labels, GRID, background=0, num_classes=num_classes)

    pairs, flat = plan(), labels.reshape(-1)
    key = (GRID.ids(flat.device) * CLASSES + flat)[pairs.order]
    assert (key[1:] >= key[:-1]).all(), "the order is not sorted by (region, class)"
    assert torch.equal(pairs.order.sort().values.long(), torch.arange(flat.numel())), "the order is no permutation"
    seconds, ratio = against(benchmark, plan, copies, 2 * labels.numel() * labels.element_size())
    report(seconds, copy_ratio=ratio, pixels_per_second=labels.numel() / seconds)


RULES = ["uniform", "weighted", "hardest", "half hard"]


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("patch", [8, 1], ids=["patches", "noise"])
def bench_sample_anchors(benchmark, report, rule, patch):
    """Partition and sample: 256 pixels of each image and class of 12 x 256 x 256 labels, against what is copied from
    papers; `noise`: every pixel has a class of its own, which no label map does."""
    shape = {"batch": LABELS[0], "height": LABELS[1], "width": LABELS[2]}
    labels = cases.label_patches(*LABELS, patch=patch)
    draw = cases.anchors(**shape, rule=rule, patch=patch).step
    order, offsets = draw()
    taken = order[: int(offsets[-1])]
    assert taken.unique().numel() == taken.numel() == LABELS[0] * CLASSES * 256, "not 256 pixels of each"
    segment = torch.repeat_interleave(torch.arange(LABELS[0] * CLASSES), offsets.diff().long())
    image = taken // (LABELS[1] * LABELS[2])
    assert torch.equal(segment, image * CLASSES + labels.reshape(-1)[taken]), "pixels of another image or class"

    wrong = torch.rand(LABELS, generator=torch.Generator().manual_seed(1)) < 0.3

    def in_torch():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(native, "serves", lambda tensor: False)
            draw()

    others = {
        "nonzero + randperm": lambda: peers.random_anchors(labels, CLASSES, 256),
        "published sampler": lambda: peers.hard_anchors(labels, wrong, CLASSES, 256),
        "PyTorch text": in_torch,
    }
    seconds, faster = in_turns(benchmark, draw, others, rounds=9)
    bars = []
    if rule == "uniform" and patch > 1:
        limits = {"nonzero + randperm": 2, "published sampler": 4, "PyTorch text": 3}
        bars = [Bar(f"times faster than the {name}", faster[name], limits[name], at_least=True) for name in limits]
    report(seconds, bars, **{f"over_{name}": ratio for name, ratio in faster.items()})


@pytest.mark.benchmark(group="plan")
def bench_sample_memory(benchmark, report):
    """Peak memory of partition and sample beyond the labels, for so many pixels that the sample itself is nothing."""
    shape = {"batch": 16, "height": 1024, "width": 1024}
    found = benchmark.pedantic(lambda: measure("anchors", **shape), rounds=1)
    pixels = 16 * 1024 * 1024
    per_pixel = found["extra_mb"] * 2**20 / pixels
    report(found["seconds"], [Bar("bytes of workspace a pixel", per_pixel, 8)], peak_mb=found["extra_mb"])


@pytest.mark.benchmark(group="threads")
def bench_sample_threads(benchmark, report):
    """One thread and two, in turns, by the wall's clock."""
    draw = cases.anchors(*LABELS).step
    seconds: dict[int, list[float]] = {1: [], 2: []}
    draw()
    for _ in range(15):
        for threads in seconds:
            with num_threads(threads):
                start = time.perf_counter()
                draw()
                seconds[threads].append(time.perf_counter() - start)
    one, two = (statistics.median(seconds[threads]) for threads in (1, 2))
    benchmark.pedantic(draw, rounds=1)
    report(two, [Bar("two threads over one", two / one, 1.0)], run_threads=2, load=busy())


MAPS = {
    "one-image": {"batch": 1, "height": 256, "width": 128},
    "eight-images": {"batch": 8, "height": 64, "width": 64},
    "eight-images-channels-last": {"batch": 8, "height": 64, "width": 64, "channels_last": True},
}


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", MAPS)
def bench_pack(benchmark, report, copies, layout, direction):
    """Gather 32 768 pixels of 128 channels in the plan's order and normalise them; backward into the map's layout."""
    features, labels = cases.region_phpc(**MAPS[layout], region_size=SIZE).arguments
    pairs = partition(labels, Grid(labels.shape[0], tuple(labels.shape[1:]), (SIZE, SIZE)))

    def gather():
        return pack(features, pairs.order, pairs.live(), normalize=True, backend="blockwise")

    rows = gather()
    exact = features.detach().double().requires_grad_()
    unit = torch.nn.functional.normalize(exact.movedim(1, -1).reshape(-1, exact.shape[1])[pairs.order], dim=1)
    grad = torch.randn(rows.data.shape, generator=torch.Generator().manual_seed(1))
    assert_close("rows", rows.data, unit)
    (found,) = torch.autograd.grad(rows.companion, features, grad, retain_graph=True)
    (wanted,) = torch.autograd.grad(unit, exact, grad.double())
    assert_close("gradient", found, wanted)

    moved = 2 * features.numel() * features.element_size()  # one read, one write
    if direction == "forward":
        with torch.no_grad():
            seconds, ratio = against(benchmark, gather, copies, moved)
    else:

        def scatter():
            return torch.autograd.grad(rows.companion, features, grad, retain_graph=True)

        seconds, ratio = against(benchmark, scatter, copies, moved * 1.5)  # two reads, one write
    report(seconds, copy_ratio=ratio)


IMAGES, SIDE = 8, 64


@pytest.fixture(scope="module")
def segments():
    """32 768 rows of 128 channels, sorted by (image, class): the map, its labels and the sorted rows."""
    features, labels = cases.region_supcon(IMAGES, SIDE, SIDE).arguments
    rows = class_sort(labels - 1, Grid(IMAGES, (SIDE, SIDE), (SIDE, SIDE), True), num_classes=CLASSES)
    return features, labels - 1, rows


def _class_means(features, labels):
    """Mean of each class of each image, in float64 [images * classes, D]."""
    pixels = features.double().flatten(2).movedim(1, 2)
    member = torch.nn.functional.one_hot(labels.flatten(1), CLASSES).double()
    return (member.transpose(1, 2) @ pixels / member.sum(1)[..., None]).flatten(0, 1)


@pytest.mark.benchmark(group="segments")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_segment_mean(benchmark, report, copies, segments, direction):
    """Means of the classes of each image from packed rows, against a copy of the rows."""
    features, labels, plan = segments
    rows = pack(features, plan.order, plan.live(), normalize=False, permutation=True, backend="blockwise")

    def mean():
        return segment_mean(rows, plan.offsets)

    def scatter():
        return torch.autograd.grad(means, rows.companion, grad, retain_graph=True)[0]

    means = mean()
    grad = torch.randn(means.shape, generator=torch.Generator().manual_seed(1))
    assert_close("means", means, _class_means(features, labels))
    share = grad.double() / plan.offsets.diff()[:, None]
    assert_close("gradient", scatter(), share.repeat_interleave(plan.offsets.diff(), 0))
    moved = features.numel() * features.element_size()  # read, or written
    seconds, ratio = against(benchmark, mean if direction == "forward" else scatter, copies, moved)
    report(seconds, copy_ratio=ratio)


@pytest.mark.benchmark(group="segments")
def bench_layer_prototypes(benchmark, report, copies, segments):
    """Mean feature of each of 8 layers of each class of each image, from the map."""
    features, labels, _ = segments
    layers = torch.randint(8, labels.shape, generator=torch.Generator().manual_seed(1))

    def prototypes():
        return hpcloss.layer_prototypes(features.detach(), layers, labels, CLASSES, 8)

    found = prototypes()
    one = (labels == 2) & (layers == 5)
    pixels = features.double().movedim(1, -1)
    wanted = torch.stack([pixels[image][one[image]].mean(0) for image in range(IMAGES)])
    assert_close("prototypes", found.prototypes.view(IMAGES, CLASSES, 8, -1)[:, 2, 5], wanted)
    seconds, ratio = against(benchmark, prototypes, copies, features.numel() * features.element_size())
    report(seconds, copy_ratio=ratio)


@pytest.mark.benchmark(group="segments")
@pytest.mark.parametrize("samples", [10, None], ids=["ten-a-class", "all"])
def bench_enqueue(benchmark, report, segments, samples):
    """Normalised pixels of 8 images into a queue of 2000 of each class."""
    features, labels, _ = segments
    queue = hpcloss.EmbeddingQueue(CLASSES, 2000, features.shape[1])

    def enqueue():
        queue.enqueue(features, labels, samples_per_class=samples)

    enqueue()
    rows = torch.nn.functional.normalize(features.detach().double().movedim(1, -1).flatten(0, 2), dim=1)
    flat = labels.reshape(-1)
    assert torch.equal(queue.filled, torch.full((CLASSES,), samples or 2000))
    for label in range(CLASSES):
        held, own = queue.embeddings[label, : samples or 2000], rows[flat == label]
        nearest = (held.double() @ own.T).max(1)
        assert_close("similarity to a pixel of the class", nearest.values, torch.ones(len(held)))
        assert nearest.indices.unique().numel() == len(held), "a pixel stands in two slots"
    seconds, _ = in_turns(benchmark, enqueue, {}, rounds=9)
    report(seconds)


@pytest.mark.benchmark(group="plan")
def bench_sample_positives(benchmark, report, segments):
    """8 other rows of its class and image for each of 32 768 rows."""
    at = segments[2].pairs().intervals

    def draw():
        return hpcloss.sample_positives(at.pos_start, at.pos_end, at.self_pos, 8)

    drawn, row = draw(), torch.arange(len(at.pos_start))[:, None]
    assert (drawn[:, 1:] > drawn[:, :-1]).all() and (drawn != row).all(), "not 8 others"
    assert (drawn >= at.pos_start[:, None]).all() and (drawn < at.pos_end[:, None]).all(), "of another class"
    seconds, _ = in_turns(benchmark, draw, {}, rounds=9)
    report(seconds)
