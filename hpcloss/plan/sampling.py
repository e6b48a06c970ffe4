"""Sampling: pixels of every interval of a partition, positives of every anchor, and regions.

This text is the definition. Every implementation (this one, C++, CUDA) gives the same integers, bit for bit.
Arithmetic is on integers unless the text says float32. `>>` is the arithmetic shift (floor), `x[a:b]` bits a to b - 1.

**Random words.** `Philox4x32-10` (Salmon, Moraes, Dror, Shaw, SC 2011) maps a counter of four 32-bit words and a key of
two words to four output words. The key is the low and the high word of the seed, an int64. The last word of the counter
is a *stream*, which separates the uses of one seed.

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

  q is a polynomial for -log2(1 - x) / x at x = v / 2^33 with 29 fraction bits. Its coefficients C are in `draw.py`.
  All products are below 2^62. The error of E is at most 2^-22 of E plus one unit, so the small values, which win, are
  as exact as the large ones. Then E is rounded to float32 (to nearest, ties to even), multiplied by 2^-40 (exact) and
  divided by the float32 weight: one correctly rounded IEEE division that keeps subnormal results. An element with a
  weight that is zero, negative or NaN is absent: it is never chosen and does not count. Elements of infinite weight
  come first, by position.
* hardest first: `image(0 - score)`, one float32 subtraction (so -0 and +0 tie). A NaN score has key 0xffffffff, the
  last.

Weights and scores of another floating type are rounded to float32 first.

**Sample.** The sample of an interval with n present elements has the min(k, n) elements with the smallest (key,
position). They are listed by ascending position, interval after interval without gaps. New offsets give the first
element of each interval.

**Hard and easy** (`tfzhou/ContrastiveSeg`). An interval has nh wrongly and ne rightly predicted elements. The sample
has `h = min(nh, max(floor(k / 2), k - ne))` wrong and `min(ne, k - h)` right elements, chosen by the uniform keys. They
are listed together by ascending position.

**Positives of an anchor.** Floyd's algorithm (Bentley and Floyd, CACM 1987). The candidates of anchor i are the rows of
its interval without itself, numbered 0 ... n-1 in order, n <= 2^31; m = min(k, n). For d = 0 ... m-1 let j = n - m + d
and `t = (w * (j + 1)) >> 32` with `w` the word of draw d. The positive is t, or j if t is in the sample already. The
sample is listed in ascending order. (Multiply-shift gives a value's probability a relative error of at most n / 2^32.)

**Regions.** The regions that can be contrasted are one interval, in ascending order. They are sampled uniformly like
pixels, with the number of the region in place of the pixel index.

The native library (`native.py`) samples if it is available, otherwise PyTorch (`draw.py`, `philox.py`). Shapes are
static and no device data is read on the host, so the code compiles with fullgraph=True and can be captured in a CUDA
graph. Every replay gives a new sample if the graph advances the seed, a device tensor.
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
    """Sampled pixels of each of S intervals: `order[offsets[s]:offsets[s + 1]]` are those of interval s.

    Attributes:
        order: Flat pixel indices `[S * k]`, 0 in the unused tail.
        offsets: First element of each interval `[S + 1]`; the last is the number of sampled pixels.
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
    """Sample k pixels of every class of every region of a label map, without replacement.

    By default a region is an image and pixels are drawn uniformly. `weights`, `scores` or `wrong` choose another rule.
    A class with fewer than k pixels in a region is taken whole. Shapes are static: nothing is read on the host.

    Args:
        labels: `[B, *S]`, integers. Labels outside [0, C) are never sampled.
        k: Pixels per region and class. The result has room for k of each.
        num_classes: Number of classes C.
        region_size: Side of a region in pixels: one number, or one per axis. None: the whole image.
        per_image: A region is a cell of one image. False: the same cell of all images.
        ignore_index: Label or labels that are never sampled. Default: -100, -1 and 255.
        weights: Floating-point map, shaped like the labels. The next pixel is taken with a probability in proportion to
            its weight. A weight that is zero, negative or NaN excludes the pixel.
        scores: Floating-point map, shaped like the labels. The highest scores are taken.
        wrong: Bool map, shaped like the labels: prediction differs from label. Half of the sample is taken from each
            kind, if there are enough (`sample_hard_easy`).
        seed: int, or 0-dim int64 tensor on the labels' device. None: drawn from torch's generator.

    Returns:
        `Sample`, a named tuple of `order` `[R * C * k]` and `offsets` `[R * C + 1]` for R regions. The pixels
            `order[offsets[s]:offsets[s + 1]]`, ascending flat indices into the labels, are the sample of region s // C
            and class s % C. int32, or int64 beyond 2^31 pixels.

    Raises:
        ValueError: `k` or `num_classes` is below 1, several of the three maps are given, or a shape or device does not
            fit.
        TypeError: A dtype is invalid.

    Examples:
        >>> import torch, hpcloss
        >>> labels = torch.randint(4, (2, 32, 32))
        >>> order, offsets = hpcloss.sample_anchors(labels, 16, num_classes=4)
        >>> order.shape, labels.view(-1)[order[offsets[1] : offsets[2]]].unique()  # class 1 of image 0
        (torch.Size([128]), tensor([1]))
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
    """Sample k elements of every interval, without replacement.

    The sample is deterministic in the seed; the module's docstring has the definition. An interval of fewer than k
    elements (of positive weight) is taken whole.

    Args:
        order: Flat pixel index of each row `[N]`, int32 or int64, as a partition gives it.
        offsets: `[S + 1]`, ascending integers in `[0, N]`. Interval s is the rows offsets[s] to offsets[s + 1]. Rows
            outside all intervals are never sampled, and their pixel index may be anything.
        k: Elements per interval.
        seed: int, or 0-dim int64 tensor on the device of `order`; change it every step. None: drawn from torch's
            generator. Not used with `scores`.
        weights: Floating-point map with one weight per pixel, any shape. The next element is taken with a probability
            in proportion to its weight.
        scores: Floating-point map with one score per pixel, any shape. The highest scores are taken.
        num_pixels: Pixel indices lie in [0, num_pixels). None: the size of `weights` or `scores`, else N. Required if
            `order` has only some of the pixels.

    Returns:
        `Sample` of static size S * k, with the dtypes of `order` and `offsets`.

    Raises:
        ValueError: `k` is below 1, both maps are given, or a shape or device does not fit.
        TypeError: A dtype is invalid.
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
    """Sample k elements of every interval, half of them wrongly predicted (hard) and half rightly (easy).

    If one kind has too few, the other fills the sample: of nh wrong and ne right elements h = min(nh, max(k // 2, k -
    ne)) wrong and min(ne, k - h) right ones are drawn, each uniformly.

    Source: Wang et al., ICCV 2021 (ContrastiveSeg), `_hard_anchor_sampling`. The authors' code needs at least k
    elements; here a smaller interval is taken whole.

    Args:
        order: As for `sample`.
        offsets: As for `sample`.
        k: Elements per interval.
        wrong: Bool map with one value per pixel, any shape: prediction differs from label.
        seed: As for `sample`.

    Returns:
        `Sample` of static size S * k, as `sample`.

    Raises:
        ValueError: `k` is below 1, or a shape or device does not fit.
        TypeError: A dtype is invalid.
    """
    _check_plan(order, offsets, k)
    _check_map("wrong", wrong, order, boolean=True)
    return Sample(*draw(order, offsets, k, wrong.numel(), kind="hard_easy", values=wrong, seed=seed))


def sample_positives(
    pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, *, seed: Tensor | int | None = None
) -> Tensor:
    """Sample k distinct positives of every anchor, uniformly from its interval without the anchor itself.

    All subsets are equally likely, up to a relative error of n / 2^32 for n positives.

    Args:
        pos_start: First positive of each anchor `[N]`, a row number.
        pos_end: Row after its last positive `[N]`.
        self_pos: Row that is the anchor itself `[N]`. A row outside the interval, such as -1, excludes nothing.
        k: Positives per anchor. Time grows with k²: use tens, not thousands.
        seed: int, or 0-dim int64 tensor on the same device; change it every step. None: drawn from torch's generator.

    Returns:
        Row numbers `[N, k]` in the dtype of `pos_start`, ascending in each row, then -1 if there are fewer than k.

    Raises:
        ValueError: `k` is below 1, or a shape or device does not fit.
        TypeError: A dtype is not int32 or int64.

    Examples:
        >>> import torch, hpcloss
        >>> start, end, own = torch.tensor([0, 0]), torch.tensor([3, 3]), torch.tensor([0, 1])
        >>> hpcloss.sample_positives(start, end, own, k=3)  # all positives, as there are two
        tensor([[ 1,  2, -1],
                [ 0,  2, -1]])
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
    """Sample at most `keep` regions among those that hold an anchor and two labels, and renumber them 0 to keep - 1.

    Args:
        regions: Region of each pixel `[N]`.
        num_regions: Number of regions.
        labels: Label of each pixel `[N]`.
        alive: Whether the pixel takes part `[N]`.
        anchor: Whether the pixel is an anchor `[N]`.
        keep: Regions to keep.
        agree: Makes several ranks choose the same regions: it exchanges what each rank has seen of a region, and the
            seed.
        seed: As for `sample`.

    Returns:
        The new region of each pixel `[N]`, `keep` for pixels of other regions (which removes them), and the old number
            of each kept region [keep], ascending, then 0 if there are fewer.
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
    # The unused tail names region 0. It writes to a place that no pixel reads.
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
