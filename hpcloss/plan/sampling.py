"""Sampling: a few pixels of every interval of a partition, a few positives of every anchor, and a few regions.

This text is the definition. Every implementation (this one, C++, CUDA) gives the same integers, bit for bit.
All arithmetic is on integers unless it says float32; `>>` is the arithmetic shift (floor), `x[a:b]` bits a to b - 1.

**Random words.** `Philox4x32-10` (Salmon, Moraes, Dror, Shaw, SC 2011) maps a counter of four 32-bit words and a key of
two to four words. The key is the low and the high word of the seed, an int64. The counter's last word is a *stream*,
which keeps the uses of one seed apart.

    word of pixel p:                 output word p mod 4 of counter (b[0:32], b[32:64], 0, 0), b = p >> 2
    word of draw d for anchor row i: output word d mod 4 of counter (i[0:32], i[32:64], d >> 2, 1)

`p` is the flat pixel index (not the row), so a pixel's word does not depend on the partition it is drawn through.

**Keys.** Every element of an interval gets a key, a 32-bit unsigned integer. `image(f)` is the order-preserving image
of a float32 with bits `b`: `~b` if the sign bit is set, else `b | 0x80000000`.

* uniform: the pixel's word.
* weighted (exponential race, Efraimidis and Spirakis 2006): `image(-log2(u) / weight)` with `u = (2 r + 1) / 2^33`,
  `r` the pixel's word. `-log2(u)` is a fixed-point integer E with 40 fraction bits:

      e = number of leading zeros of r in 32 bits (32 for r = 0)
      v = 2^33 - ((2 r + 1) << e)                       so 1 <= v <= 2^32 and u = 2^-e (1 - v / 2^33)
      q = C[7];  q = ((q * v) >> 32) + C[n] for n = 6 ... 0
      E = (e << 40) + ((v * q) >> 22)

  q is a polynomial for -log2(1 - x) / x at x = v / 2^33 with 29 fraction bits; its coefficients C are in
  `draw.py`. All products are below 2^62, and E is off by at most 2^-22 of itself and one unit: the small
  values, which win, are as exact as the large ones. Then E is rounded to float32 (to nearest, ties to even), multiplied
  by 2^-40 (exact) and divided by the float32 weight: one correctly rounded IEEE division, subnormal results kept.
  An element whose weight is zero, negative or NaN is absent: it is never chosen and does not count. Elements of
  infinite weight come first, by position.
* hardest first: `image(0 - score)`, one float32 subtraction (so -0 and +0 tie); a NaN score has key 0xffffffff, the
  last.

Weights and scores of another floating type are rounded to float32 first.

**Sample.** Of an interval with n present elements, the min(k, n) with the smallest (key, position). They are listed by
ascending position, interval after interval without gaps; new offsets say where each interval's begin.

**Hard and easy** (`tfzhou/ContrastiveSeg`). An interval has nh wrongly and ne rightly predicted elements. Of the wrong
ones `h = min(nh, max(floor(k / 2), k - ne))` and of the right ones `min(ne, k - h)` are drawn, uniformly by the keys
above, and listed together by ascending position.

**Positives of an anchor.** Floyd's algorithm (Bentley and Floyd, CACM 1987). The candidates of anchor i are the rows of
its interval without itself, numbered 0 ... n-1 in order, n <= 2^31; m = min(k, n). For d = 0 ... m-1 let j = n - m + d
and `t = (w * (j + 1)) >> 32` with `w` the word of draw d; take t, or j if t was taken before. Listed ascending. (A
value's probability is off by at most n / 2^32 of itself, the price of multiply-shift.)

**Regions.** Those that can be contrasted are one interval, in ascending order; they are drawn from it as pixels are,
uniformly, with the number of a region in place of the pixel index.

The native library (`native.py`) draws where it is there, elsewhere PyTorch (`draw.py`, `philox.py`).
Everything here has static shapes and reads no device data on the host: it compiles with fullgraph=True and can be
captured in a CUDA graph, where the seed, a device tensor, gives every replay a fresh sample if the graph advances it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.checks import boolean, check_sizes, count, integers
from hpcloss.operators import ops, plain
from hpcloss.plan.draw import draw
from hpcloss.plan.labels import IGNORED, check_classes_and_ignored
from hpcloss.plan.partition import class_sort
from hpcloss.plan.philox import as_seed, philox
from hpcloss.plan.regions import Grid, region_shape

__all__ = ["Sample", "philox", "sample", "sample_anchors", "sample_hard_easy", "sample_positives"]


class Sample(NamedTuple):
    """A compact plan: pixels `order[offsets[s]:offsets[s + 1]]` were chosen from interval s.

    order: [S * k] flat pixel indices, 0 in the unused tail. offsets: [S + 1].
    """

    order: Tensor
    offsets: Tensor


def sample_anchors(
    labels: Tensor,
    k: int,
    *,
    num_classes: int,
    region_size: int | Sequence[int] | None = None,
    per_image: bool = True,
    ignore_index: int | Sequence[int] = IGNORED,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    wrong: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Sample:
    """Draw k pixels of every class of every region of a label map: by default of every class of every image.

    Uniformly; or by `weights`; or hardest (highest `scores`) first; or half wrongly predicted ones, half right ones, as
    `sample_hard_easy` says. Without replacement; a class with fewer pixels is taken whole. Nothing is read on the host,
    so shapes are static: what is not filled is 0 behind offsets[-1].

        order, offsets = sample_anchors(labels, 256, num_classes=4)
        anchors = features.movedim(1, -1).reshape(-1, features.shape[1])[order]    # [B * 4 * 256, D]
        filled = torch.arange(len(order)) < offsets[-1]                            # which of them were drawn
        segment = torch.searchsorted(offsets, torch.arange(len(order)), right=True) - 1    # image * 4 + class

    Args:
        labels: [B, *S] integers of any dtype. Those outside [0, num_classes) or in `ignore_index` are never drawn.
        k: pixels per region and class; the result has room for k of each, however few there are.
        num_classes: C.
        region_size: cells of a grid, in pixels (int, or one per axis); None: the whole image.
        per_image: whether each image has its own regions, or a region is the same cell of all images.
        weights, scores: floating maps like the labels; wrong: bool map like the labels. At most one of them.
        seed: 0-dim int64 tensor on the labels' device, or an int. Default: drawn from torch's generator.

    Returns:
        Sample(order [R * C * k], offsets [R * C + 1]): pixels order[offsets[s]:offsets[s + 1]], ascending flat indices
        into the labels, are the sample of region s // C and class s % C. int32 (int64 beyond 2^31 pixels).

    Raises:
        ValueError: k < 1, num_classes < 1, several maps, shapes or devices that do not fit. TypeError: dtypes.
    """
    labels = plain(labels)
    weights, scores, wrong = [None if values is None else plain(values) for values in (weights, scores, wrong)]
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.dim() < 2:
        raise ValueError(f"labels must have shape [B, *S], got {list(labels.shape)}")
    k, num_classes = count("k", k), count("num_classes", num_classes)
    ignored = integers("ignore_index", ignore_index)
    check_classes_and_ignored(num_classes, ignored)
    _check_one_map(labels, weights=weights, scores=scores, wrong=wrong)
    check_sizes("region_size", region_size)
    boolean("per_image", per_image)
    spatial = tuple(labels.shape[1:])
    grid = Grid(labels.shape[0], spatial, region_shape(region_size, spatial), per_image)
    rows = class_sort(labels, grid, ignore_index=ignored, num_classes=num_classes)
    if wrong is not None:
        return sample_hard_easy(rows.order, rows.offsets, k, wrong, seed=seed)
    return sample(rows.order, rows.offsets, k, seed=seed, weights=weights, scores=scores, num_pixels=labels.numel())


def sample(
    order: Tensor,
    offsets: Tensor,
    k: int,
    *,
    seed: Tensor | int | None = None,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    num_pixels: int | None = None,
) -> Sample:
    """Draw k elements of every interval: uniformly, by weight, or hardest (highest score) first.

    Without replacement, and deterministic in the seed; the definition is in the module docstring. With `weights`, an
    element of weight w is the next one taken with probability w / (sum over those left). An interval of fewer than k
    elements (of positive weight) is taken whole.

    Args:
        order: [N] int32 or int64, sorted row -> flat pixel index, as a partition gives it.
        offsets: [S + 1] integers, not decreasing, in [0, N]: interval s is rows offsets[s] to offsets[s + 1]. Rows
            outside [offsets[0], offsets[S]) are dead: never chosen, and their pixel index may be anything.
        k: elements per interval.
        seed: 0-dim int64 tensor on the device of `order` (advance it every step), or an int; default: drawn from
            torch's generator. Not used with `scores`.
        weights: floating map with one weight per pixel, any shape, or None.
        scores: floating map with one score per pixel, any shape, or None.
        num_pixels: the pixel indices lie in [0, num_pixels). Default: the size of `weights` or `scores`, else N, which
            holds for the partition of a whole batch; give it when `order` names only some of the pixels.

    Returns:
        Sample of static size S * k, with the dtypes of `order` and `offsets`.

    Raises:
        ValueError: k < 1, both weights and scores, shapes or devices that do not fit. TypeError: dtypes.
    """
    _check_plan(order, offsets, k)
    if weights is not None and scores is not None:
        raise ValueError("at most one of weights and scores may be given, got both")
    for name, values in (("weights", weights), ("scores", scores)):
        if values is not None:
            _check_map(name, values, order)
            num_pixels = _count_pixels(name, values, num_pixels)
    num_pixels = order.numel() if num_pixels is None else num_pixels
    if num_pixels < 0:
        raise ValueError(f"num_pixels must be at least 0, got {num_pixels}")
    kind, values = "uniform", None
    if weights is not None:
        kind, values = "weighted", weights
    elif scores is not None:
        kind, values = "hardest", scores
    return Sample(*draw(order, offsets, k, num_pixels, kind=kind, values=values, seed=seed))


def sample_hard_easy(
    order: Tensor,
    offsets: Tensor,
    k: int,
    wrong: Tensor,
    *,
    seed: Tensor | int | None = None,
) -> Sample:
    """Draw k elements of every interval, half of them wrongly predicted (hard) and half rightly (easy).

    Where one half has too few, the other fills the quota: of nh wrong and ne right elements,
    h = min(nh, max(k // 2, k - ne)) wrong and min(ne, k - h) right ones are drawn, each uniformly. This is the anchor
    sampler of ContrastiveSeg (Wang et al., ICCV 2021; `_hard_anchor_sampling`), which wants at least k elements; here
    a smaller interval is taken whole.

    Args:
        order, offsets, k, seed: as for `sample`.
        wrong: bool map with one value per pixel, any shape: prediction != label.

    Returns and raises as `sample`.
    """
    _check_plan(order, offsets, k)
    _check_map("wrong", wrong, order, boolean=True)
    return Sample(*draw(order, offsets, k, wrong.numel(), kind="hard_easy", values=wrong, seed=seed))


def sample_positives(
    pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, *, seed: Tensor | int | None = None
) -> Tensor:
    """Draw k distinct positives for every anchor, uniformly from its interval without itself.

    Every subset of the right size is equally likely (up to n / 2^32); the definition is in the module docstring.

    Args:
        pos_start, pos_end: [N] integers: the positives of anchor i are the rows pos_start[i] to pos_end[i].
        self_pos: [N] integers: the row that is anchor i itself; one outside the interval, such as -1, removes nothing.
        k: positives per anchor. Time grows with k^2: it is meant for tens, not thousands.
        seed: 0-dim int64 tensor on the same device (advance it every step), or an int; default: drawn from torch's
            generator.

    Returns:
        [N, k] row numbers, dtype of `pos_start`, each row ascending, then -1 where fewer than k exist.

    Raises:
        ValueError: k < 1, shapes or devices that do not fit. TypeError: dtypes that are not integer.
    """
    _check_k(k)
    for name, values in (("pos_start", pos_start), ("pos_end", pos_end), ("self_pos", self_pos)):
        _check_integers(name, values)
        if values.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(values.shape)}")
        if values.shape != pos_start.shape:
            raise ValueError(f"{name} must have {pos_start.numel()} elements, as pos_start, got {values.numel()}")
        if values.device != pos_start.device:
            raise ValueError(f"{name} must be on {pos_start.device}, as pos_start, got {values.device}")
    return ops.sample_positives(pos_start, pos_end, self_pos, k, as_seed(seed, pos_start.device))


def choose_regions(
    regions: Tensor,
    num_regions: int,
    labels: Tensor,
    alive: Tensor,
    anchor: Tensor,
    keep: int,
    agree: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep at most `keep` regions, drawn uniformly among those that can be contrasted, and renumber them 0 .. keep - 1.

    A region can be contrasted if it holds an anchor and two labels. regions [N] ids, labels [N], alive [N] whether the
    pixel takes part, anchor [N] whether it is an anchor. Returns the new ids [N], `keep` for the pixels of
    regions left out (which removes them), and the old number of each kept region [keep], ascending, then 0 where there
    are fewer. agree: makes several ranks draw the same, from the largest of what each has seen in a region and the seed
    of one of them. seed: as for `sample`.
    """
    anchors = torch.zeros(num_regions, dtype=torch.int64, device=regions.device).scatter_add_(0, regions, anchor.long())
    bounds = torch.iinfo(torch.int64)
    lowest, highest = (
        torch.full((num_regions,), start, dtype=torch.int64, device=regions.device).scatter_reduce_(
            0, regions, torch.where(alive, labels, start), how
        )
        for start, how in ((bounds.max, "amin"), (bounds.min, "amax"))
    )
    seen, seed = torch.stack([anchors, ~lowest, highest]), as_seed(seed, regions.device)
    if agree is not None:
        seen, seed = agree(seen, seed)
    possible = (seen[0] > 0) & (~seen[1] < seen[2])
    rows = class_sort(torch.where(possible, 0, -1), num_classes=1)
    chosen, offsets = sample(rows.order, rows.offsets, keep, seed=seed)
    new = torch.arange(keep, device=regions.device)
    # The unused tail names region 0; it writes to a place that no pixel reads.
    place = torch.where(new < offsets[-1], chosen.long(), num_regions)
    number = torch.full((num_regions + 1,), keep, dtype=torch.int64, device=regions.device)
    return number.scatter_(0, place, new)[regions], chosen.long()


# ---- checks of shapes and dtypes, never of data


def _check_plan(order: Tensor, offsets: Tensor, k: int) -> None:
    _check_k(k)
    for name, values in (("order", order), ("offsets", offsets)):
        _check_integers(name, values)
        if values.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(values.shape)}")
    if offsets.numel() == 0:
        raise ValueError("offsets must have shape [S + 1], got [0]")
    if offsets.device != order.device:
        raise ValueError(f"offsets must be on {order.device}, as order, got {offsets.device}")


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    count("k", k)


def _check_integers(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {values.dtype}")


def _check_one_map(labels: Tensor, **maps: Tensor | None) -> None:
    given = {name: values for name, values in maps.items() if values is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of {' and '.join(given)} may be given, got both")
    for name, values in given.items():
        if values.shape != labels.shape:
            raise ValueError(f"{name} must have shape {list(labels.shape)}, as labels, got {list(values.shape)}")
        if values.device != labels.device:
            raise ValueError(f"{name} must be on {labels.device}, as labels, got {values.device}")


def _check_map(name: str, values: Tensor, order: Tensor, boolean: bool = False) -> None:
    if boolean and values.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {values.dtype}")
    if not boolean and not values.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {values.dtype}")
    if values.device != order.device:
        raise ValueError(f"{name} must be on {order.device}, as order, got {values.device}")
    if values.numel() == 0 and order.numel() > 0:
        raise ValueError(f"{name} must have one value per pixel, got none for {order.numel()} rows")


def _count_pixels(name: str, values: Tensor, num_pixels: int | None) -> int:
    if num_pixels is not None and num_pixels != values.numel():
        raise ValueError(f"{name} must have num_pixels = {num_pixels} values, got {values.numel()}")
    return values.numel()
