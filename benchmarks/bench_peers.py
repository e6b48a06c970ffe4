"""Every public loss, and each beside what people use: a fresh process for each row, on one thread.

A row tells the time of the forward and of the backward pass, peak memory and host syncs. Correct first: each method is
compared with the dense float64 form on a small input, and in value and gradient with this package on the row's own.
Sizes that `make bench` measures alone are marked slow.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import cases
import fresh
import peers
import pytest
from measure import MAX_GIGABYTES

WITHIN = 1e-4  # relative, of value and gradient: sums of this many fp32 numbers, each in an order of its own


@pytest.fixture(scope="module")
def first():
    """Value and gradient of the first method that was given an input, by the input's name."""
    return {}


@pytest.fixture
def row(benchmark, report, first):
    """row(method, shape, same, ...): measure a case on a shape; those with an equal `same` must agree."""

    def measured(method: str, shape: dict[str, object], same: object = None, **figures: object) -> None:
        figures = {"method": method, **figures}
        try:
            options = {**shape, "thorough": True}
            found = benchmark.pedantic(fresh.measure, args=(method,), kwargs=options, rounds=1, iterations=1)
        except subprocess.TimeoutExpired as error:
            report(None, note=f"not finished in {error.timeout:.0f} s", **figures)
            return
        if "out_of_memory" in found:
            report(None, note=f"more than {MAX_GIGABYTES:g} GB", **figures)
            return
        for name in ("loss", "gradient"):
            wanted = first.setdefault((str(same), name), found[name]) if same else found[name]
            assert abs(found[name] - wanted) <= WITHIN * abs(wanted), f"{name} {found[name]}, not {wanted}"
        passes = {name: found[name] for name in ("forward_seconds", "backward_seconds")}
        report(sum(passes.values()), peak_mb=found["extra_mb"], syncs=found.get("syncs"), **passes, **figures)

    return measured


def beside(methods: Iterable[str], sizes: Iterable[object], quick: Iterable[object]) -> list:
    """(method, size) for parametrize, by size."""
    found = []
    for size in sizes:
        for method in methods:
            marks = [] if size in quick else [pytest.mark.slow]
            if why := peers.why_not(method):
                marks.append(pytest.mark.skip(reason=why))
            text = "-".join(map(str, size)) if isinstance(size, tuple) else size
            found.append(pytest.param(method, size, marks=marks, id=f"{method}-{text}"))
    return found


QUICK = (1024, 4096)


# ----------------------------------------------------------------------------------------------- this package alone


@pytest.mark.benchmark(group="every loss")
@pytest.mark.parametrize("loss", cases.LOSSES)
def bench_every_loss(row, loss):
    """4096 rows of vectors, or 16 384 pixels of four images; regions and samples as the losses have them."""
    row(loss, cases.LOSSES[loss])


# -------------------------------------------------------------------------------------------------------- against N

SUPCON = ["supcon", "eager_supcon", "pml_supcon"]
COUNTS = [16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384]


@pytest.mark.benchmark(group="SupCon against N")
@pytest.mark.parametrize(("method", "count"), beside(SUPCON, COUNTS, QUICK))
def bench_supcon_against_n(row, method, count):
    row(method, {"count": count}, same=f"supcon {count}", n=count)


@pytest.mark.benchmark(group="SupCon against N")
@pytest.mark.skipif(bool(peers.why_not("compiled_supcon")), reason=str(peers.why_not("compiled_supcon")))
@pytest.mark.parametrize("count", [1024, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 64, 4096, 8192))])
def bench_compiled_supcon_against_n(row, count):
    row("compiled_supcon", {"count": count}, same=f"supcon {count}", n=count)


@pytest.mark.benchmark(group="NT-Xent against N")
@pytest.mark.parametrize(
    ("method", "count"),
    [
        *beside(["ntxent", "lightly_ntxent"], [16, 64, 256, 1024, 4096, 8192, 16384], (256, *QUICK)),
        *beside(["monai_contrastive", "pml_ntxent"], [16, 64, 256, 1024, 4096], (256, 1024)),
    ],
)
def bench_ntxent_against_n(row, method, count):
    """`count` rows: two views of half as many images."""
    row(method, {"count": count}, same=f"ntxent {count}", n=count)


INFONCE = ["infonce", "eager_infonce", "linear_cross_entropy", "info_nce_pytorch"]


@pytest.mark.benchmark(group="InfoNCE against N")
@pytest.mark.parametrize(("method", "count"), beside(INFONCE, [16, 64, 256, 1024, 4096, 8192, 16384], QUICK))
def bench_infonce_against_n(row, method, count):
    row(method, {"count": count}, same=f"infonce {count}", n=count)


# -------------------------------------------------------------------------------- against width, classes, regions


@pytest.mark.benchmark(group="SupCon against D")
@pytest.mark.parametrize(("method", "dim"), beside([*SUPCON, "compiled_supcon"], [32, 512], ()))
def bench_supcon_against_d(row, method, dim):
    row(method, {"count": 4096, "dim": dim}, same=f"supcon of {dim}", n=4096, dim=dim)


@pytest.mark.benchmark(group="SupCon against classes")
@pytest.mark.parametrize(("method", "classes"), beside(SUPCON, [2, 16, 64], ()))
def bench_supcon_against_classes(row, method, classes):
    row(method, {"count": 4096, "classes": classes}, same=f"supcon of {classes} classes", n=4096, classes=classes)


@pytest.mark.benchmark(group="block loop against regions")
@pytest.mark.parametrize(("method", "regions"), beside(["published_phpc", "block_loop"], [1, 4, 16, 64], (16,)))
def bench_block_loop_against_regions(row, method, regions):
    """8192 pixels in so many regions; the form of the paper's code, as it was meant."""
    size = {1: 32, 4: 16, 16: 8, 64: 4}[regions]
    shape = {"batch": 8, "height": 32, "width": 32, "region_size": size}
    row(method, shape, same=f"phpc of {regions} regions", n=8192, regions=regions)


PIXELS = [(4, 64, 4), (4, 64, 16), (12, 128, 4)]


@pytest.mark.benchmark(group="sampled pixels")
@pytest.mark.parametrize(("method", "shape"), beside(["pixel_contrast", "contrastiveseg"], PIXELS, PIXELS[:1]))
def bench_pixel_contrast(row, method, shape):
    """Images, side and classes: 100 pixels of each class of each image, half of them hard. Each draws its own."""
    batch, side, classes = shape
    row(
        method,
        {"batch": batch, "height": side, "width": side, "classes": classes},
        images=batch,
        side=side,
        classes=classes,
    )
