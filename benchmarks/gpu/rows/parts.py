"""Parts of a step: primitives alone, packing, partition and sample."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.cases import HALF, MANY, D, label_map, region_phpc, rows_of, spread
from benchmarks.gpu.check import ANCHORS, distance, expect, judged
from benchmarks.gpu.known import Known, barred
from benchmarks.gpu.machine import BACKEND, DEVICE, size
from benchmarks.gpu.timing import replayed, timed
from benchmarks.measure import Bar
from hpcloss.plan.partition import class_sort, partition
from hpcloss.plan.regions import Grid
from hpcloss.plan.sampling import sample
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def primitive_row(run: Known, primitive: str, rule: str) -> dict[str, Any]:
    """One primitive alone on unit rows of four equal classes; the share of its forward and of its backward pass."""
    labels = torch.arange(MANY, device=DEVICE) % 4
    pairs = partition(labels, num_classes=4)
    data = torch.nn.functional.normalize(spread(labels, D), dim=1).to(HALF)[pairs.order.long()]
    rows = Rows(data, torch.zeros(MANY, D, device=DEVICE, requires_grad=True), BACKEND)
    scale, upstream = Scale(torch.tensor(10.0, device=DEVICE), 10.0), torch.full((MANY,), 1 / MANY, device=DEVICE)
    options: dict[str, Any] = {}
    if rule == "own":
        options |= {"hardness": 1.0, "stat": pair_lse(rows.detach(), pairs, "negatives", scale)}

    def forward() -> Tensor:
        return pair_lse(rows, pairs, rule, scale) if primitive == "pair_lse" else (
            pair_mean(rows, pairs, rule, scale, **options)[0])  # fmt: skip

    result = forward()
    expect(bool(result.isfinite().all()), "not finite")
    flops = 2.0 * D * MANY**2 * {"negatives": 0.75, "others": 1.0}.get(rule, 0.25)  # the rule's share of all pairs
    backward = partial(torch.autograd.grad, result, rows.companion, upstream, retain_graph=True)
    with torch.no_grad():
        there = timed(forward, run.seconds)
    back = timed(backward, run.seconds)
    figures = {"n": MANY, "dim": D, "dtype": "float16", "flops": flops}
    figures |= {"forward_ms": there, "backward_ms": back, "ms": there + back}
    if rate := run.ceilings.get("float16"):
        work = {"forward_share": flops / there, "backward_share": 2 * flops / back, "share": 3 * flops / (there + back)}
        figures |= {name: 1e3 * speed / rate for name, speed in work.items()}
    return figures


def pack_row(run: Known, channels_last: bool) -> dict[str, Any]:
    """Gather and normalise a map in the order of 16 x 16 regions, and its backward pass, as replayed graphs.

    Bytes: the map once and the rows once; back the rows, their fp32 gradient and the map's gradient once.
    """
    batch, side, region = size((8, 256, 16), (2, 8, 4))
    case = region_phpc(batch, side, side, region)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = case.leaves[0].detach().contiguous(memory_format=layout)
    pairs = partition(case.labels, Grid(batch, (side, side), (region, region)))
    # The operators themselves: a captured backward pass would run on the stream of its forward pass.
    there = partial(torch.ops.hpcloss.pack, features, pairs.order, pairs.live(), True, BACKEND)
    data, inverse_norm = there()
    grad = torch.randn(data.shape, device=DEVICE)
    of_map = (True, list(features.shape), list(features.stride()), features.dtype, True, BACKEND)
    back = partial(torch.ops.hpcloss.pack_backward, grad, data, inverse_norm, pairs.order, *of_map)
    chosen = torch.randperm(len(grad), device=DEVICE)[:ANCHORS]
    pixels = pairs.order[chosen].long()
    leaf = rows_of(features)[pixels].double().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=1)
    (wanted,) = torch.autograd.grad(unit, leaf, grad[chosen].double())
    figures = judged(distance(data[chosen], unit), distance(rows_of(back())[pixels], wanted), "float16")
    bytes_moved, names = [4 * features.numel(), 8 * features.numel()], ("pack", "unpack")
    ms = [replayed(function, run.seconds) for function in (there, back)]
    figures |= {"n": len(grad), "dim": D, "dtype": "float16", "bytes": bytes_moved}
    figures |= {"forward_ms": ms[0], "backward_ms": ms[1], "ms": sum(ms)}
    copy = run.ceilings.get("copy") or math.inf
    shares = [1e3 * moved / took / copy for moved, took in zip(bytes_moved, ms)]
    return barred(figures, *(Bar(f"{name}: share of the copy rate", x, 0.7, True) for name, x in zip(names, shares)))


def plan_rows(run: Known, num_classes: int | None) -> dict[str, Any]:
    """Partition of 12 x 512 x 512 labels into regions of 16 x 16."""
    batch, side, region = size((12, 512, 16), (2, 8, 4))
    labels = label_map(batch, side, side, 0.2)
    grid = Grid(batch, (side, side), (region, region))
    plan = partial(partition, labels, grid, background=0, num_classes=num_classes)
    pairs = plan()
    key = (grid.ids(labels.device) * 5 + labels.reshape(-1))[pairs.order.long()]
    assert bool((key[1:] >= key[:-1]).all()), "the order is not sorted"
    return {"n": labels.numel(), "ms": timed(plan, run.seconds)}


def sample_rows(run: Known, kind: str, limit: float) -> dict[str, Any]:
    """Partition and sample of 12 x 512 x 512 labels: 256 pixels of each image and class; against the published loop."""
    batch, side, k = size((12, 512, 256), (2, 8, 5))
    labels = label_map(batch, side, side, 0.2)
    maps = {"uniform": {}, "weighted": {"weights": torch.rand(labels.shape, device=DEVICE)}}[kind]
    grid = Grid(batch, (side, side), (side, side), per_image=True)
    seed = torch.tensor(7, device=DEVICE)

    def draw() -> Any:
        rows = class_sort(labels, grid, num_classes=5)
        return sample(rows.order, rows.offsets, k, seed=seed, num_pixels=labels.numel(), **maps)

    drawn, wrong = draw(), torch.rand(labels.shape, device=DEVICE) < 0.3
    taken = drawn.order[: int(drawn.offsets[-1])].long()
    assert taken.unique().numel() == taken.numel(), "a pixel was drawn twice"
    cpu = {name: values.cpu() for name, values in maps.items()}
    rows = class_sort(labels.cpu(), grid, num_classes=5)
    on_cpu = sample(rows.order, rows.offsets, k, seed=7, num_pixels=labels.numel(), **cpu)
    assert torch.equal(drawn.order.cpu(), on_cpu.order), "the sample is not the one drawn on the CPU"
    figures = {"n": labels.numel(), "ms": replayed(draw, run.seconds)}
    loop = timed(partial(peers.hard_anchors, labels, wrong, 5, k), run.seconds)
    figures |= {"eager_ms": timed(draw, run.seconds), "published_loop_ms": loop}
    ratio = Bar("faster than the published loop", loop / figures["ms"], 50, True)
    return barred(figures, Bar("ms", figures["ms"], limit), ratio)
