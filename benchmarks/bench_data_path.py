"""What happens before and after the pairs: the plan, gather and scatter, samples; against copies of the same bytes."""

from __future__ import annotations

import cases
import pytest
import torch
from measure import Bar, Copies, against, assert_close, interleaved

from hpcloss.pack import pack
from hpcloss.partition import class_sort, partition
from hpcloss.regions import grid_regions
from hpcloss.sampling import sample

LABELS = (12, 256, 256)
CLASSES, SIZE, PER_CLASS = 4, 16, 64


@pytest.fixture(scope="module")
def copies():
    return Copies()


@pytest.fixture(scope="module")
def labels():
    """Patches of one class, as in a segmentation map."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(CLASSES, (LABELS[0], LABELS[1] // 8, LABELS[2] // 8), generator=generator)
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)


def _regions(labels):
    batch, *spatial = labels.shape
    return grid_regions(batch, tuple(spatial), (SIZE, SIZE), per_image=False, device=labels.device)


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize("num_classes", [None, CLASSES], ids=["any-labels", "num-classes"])
def bench_partition(benchmark, report, copies, labels, num_classes):
    """Sort 12 x 256 x 256 pixels by (region, class) and find the intervals."""
    regions, count = _regions(labels)

    def plan():
        return partition(labels.reshape(-1), regions, count, background=0, num_classes=num_classes)

    pairs, flat = plan(), labels.reshape(-1)
    key = (regions.reshape(-1) * CLASSES + flat)[pairs.order]
    assert (key[1:] >= key[:-1]).all(), "the order is not sorted by (region, class)"
    assert torch.equal(pairs.order.sort().values.long(), torch.arange(flat.numel())), "the order is no permutation"
    seconds, ratio = against(benchmark, plan, copies, 2 * labels.numel() * labels.element_size())
    report(seconds, copy_ratio=ratio, pixels_per_second=labels.numel() / seconds)


@pytest.mark.benchmark(group="plan")
def bench_grid_regions(benchmark, report, copies, labels):
    regions, count = _regions(labels)
    assert count == (LABELS[1] // SIZE) * (LABELS[2] // SIZE)
    assert int(regions.max()) == count - 1
    seconds, ratio = against(benchmark, lambda: _regions(labels), copies, labels.numel() * labels.element_size())
    report(seconds, copy_ratio=ratio)


@pytest.mark.benchmark(group="plan")
def bench_sample(benchmark, report, copies, labels):
    """64 pixels of every (region, class), uniformly, after the partition."""
    regions, count = _regions(labels)
    flat = labels.reshape(-1)
    order, offsets, _ = class_sort(flat, regions, count, background=0, num_classes=CLASSES)
    seed = torch.tensor(7)

    def draw():
        return sample(order, offsets, PER_CLASS, seed=seed, num_pixels=flat.numel())

    drawn = draw()
    taken = drawn.order[: int(drawn.offsets[-1])]
    assert taken.unique().numel() == taken.numel(), "a pixel was drawn twice"
    counts = torch.minimum(offsets[1:] - offsets[:-1], torch.tensor(PER_CLASS))
    assert torch.equal((drawn.offsets[1:] - drawn.offsets[:-1]).long(), counts.long()), "wrong number of samples"
    seconds, ratio = against(benchmark, draw, copies, 2 * labels.numel() * labels.element_size())
    report(seconds, copy_ratio=ratio, pixels_per_second=flat.numel() / seconds)


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
    batch, *spatial = labels.shape
    regions, count = grid_regions(batch, tuple(spatial), (SIZE, SIZE), per_image=False, device=labels.device)
    pairs = partition(labels.reshape(-1), regions, count)

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


@pytest.mark.benchmark(group="small N")
@pytest.mark.parametrize("side", [16, 32])
def bench_small_region_phpc(benchmark, report, side):
    """One small image, one region: never slower than eager by more than 1.2 times."""
    shape = {"batch": 1, "height": side, "width": side}
    ours, eager = cases.region_phpc(**shape), cases.eager_phpc(**shape)
    assert_close("loss", ours.step(), eager.step())
    seconds, eager_over_ours = interleaved(benchmark, ours.step, eager.step, rounds=30)
    report(seconds, [Bar("time over eager", 1 / eager_over_ours, 1.2)], n=side * side)
