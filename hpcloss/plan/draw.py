"""The operators of sampling: the native library's, or PyTorch's. `sampling.py` defines the samples, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.operators import ops, register
from hpcloss.plan import native
from hpcloss.plan.philox import MASK, POSITIVES, as_seed, dense_words, in_chunks, key_words, philox_block, words_at

_ABSENT = 1 << 32  # above every key
# -log2(1 - x) / x on 0 < x <= 1/2 as a polynomial in 2 x, minimax in relative error, 29 fraction bits; C[0] first
_LOG2_COEFFICIENTS = (774540888, 193649403, 64260302, 26358647, 1840421, 19010875, -13089007, 7170137)


def draw(
    order: Tensor,
    offsets: Tensor,
    k: int,
    num_pixels: int,
    *,
    kind: str = "uniform",
    values: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """At most k elements of every interval, as the order and offsets of `sampling.Sample`.

    kind: "uniform", "weighted", "hardest" or "hard_easy". All but the first read `values`, one per pixel. Arguments are
    not checked here.
    """
    values = None if values is None else values.detach()
    return ops.sample(order, offsets, k, kind, values, num_pixels, as_seed(seed, order.device))


def _sample(
    order: Tensor, offsets: Tensor, k: int, kind: str, values: Tensor | None, num_pixels: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    if order.numel() == 0:
        return order.new_zeros((offsets.numel() - 1) * k), torch.zeros_like(offsets)
    few = order.device.type == "cpu" or (k <= native.MAX_CUDA_SAMPLES and offsets.numel() <= native.MAX_CUDA_INTERVALS)
    if few and order.numel() <= native.MAX_ROWS and native.serves(order):
        if values is not None:
            values = (values if kind == "hard_easy" else values.float()).contiguous()
        bounds = offsets
        if offsets.dtype != order.dtype:
            # Clamped: an offset beyond int32 would wrap to a plausible number.
            bounds = offsets.clamp(-1, min(order.numel() + 1, torch.iinfo(order.dtype).max)).to(order.dtype)
        chosen, chosen_offsets = native.sample(
            order.contiguous(), bounds.contiguous(), k, kind, values, num_pixels, seed
        )
        return chosen, chosen_offsets.to(offsets.dtype)
    return _sample_in_torch(order, offsets, k, kind, values, num_pixels, seed)


def _sample_in_torch(
    order: Tensor, offsets: Tensor, k: int, kind: str, values: Tensor | None, num_pixels: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    starts = offsets.long()
    group = _group_of_row(starts, order.numel())
    pixels = _live_pixels(order, group, starts.numel() - 1)
    keys = _keys(key_words(seed), pixels, kind, values, num_pixels)
    if values is not None and kind == "hard_easy":
        chosen = _smallest_hard_easy(starts, group, keys, _at(values, pixels), k)
    else:
        present = _count(keys < _ABSENT, starts) if kind == "weighted" else starts.diff()
        limit = torch.nn.functional.pad(starts[:-1] + present.clamp(0, k), (1, 1))
        chosen = _smallest(group, keys, limit)
    return _compact(order, chosen, offsets, k)


def _sample_positives(pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, seed: Tensor) -> Tensor:
    if len({pos_start.dtype, pos_end.dtype, self_pos.dtype}) > 1:
        rows = _sample_positives(pos_start.long(), pos_end.long(), self_pos.long(), k, seed)
        return rows.to(pos_start.dtype)
    if pos_start.numel() and native.serves(pos_start):
        return native.sample_positives(pos_start.contiguous(), pos_end.contiguous(), self_pos.contiguous(), k, seed)
    return _sample_positives_in_torch(pos_start, pos_end, self_pos, k, seed)


def _sample_positives_in_torch(pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, seed: Tensor) -> Tensor:
    key = key_words(seed)
    first, own = pos_start.long(), self_pos.long()
    has_self = (own >= first) & (own < pos_end)
    n = (pos_end.long() - first - has_self.long()).clamp(min=0)
    m = n.clamp(max=k)

    rows = torch.arange(n.numel(), device=n.device)
    zero = torch.zeros_like(key[0])
    none = torch.iinfo(torch.int64).max
    chosen: list[Tensor] = []
    taken = n.new_empty((k, n.numel()))
    for d in range(k):
        if d % 4 == 0:
            words = philox_block((rows & MASK, rows >> 32, zero + (d >> 2), zero + POSITIVES), key)
        j = n - m + d
        t = (words[d % 4] * (j + 1)) >> 32
        if d:
            t = torch.where((taken[:d] == t).any(0), j, t)
        t = torch.where(d < m, t, none)
        taken[d] = t
        chosen.append(t)
    draws = torch.stack(chosen, 1).sort(1).values
    result = first[:, None] + draws.clamp(max=none >> 1)
    result = result + (has_self[:, None] & (result >= own[:, None])).long()
    return torch.where(draws < none, result, -1).to(pos_start.dtype)


def _fake_sample(
    order: Tensor, offsets: Tensor, k: int, kind: str, values: Tensor | None, num_pixels: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    return order.new_empty((offsets.numel() - 1) * k), torch.empty_like(offsets)


def _fake_sample_positives(pos_start: Tensor, pos_end: Tensor, self_pos: Tensor, k: int, seed: Tensor) -> Tensor:
    return pos_start.new_empty(pos_start.numel(), k)


register(
    "sample",
    "(Tensor order, Tensor offsets, SymInt k, str kind, Tensor? values, SymInt num_pixels, Tensor seed)"
    " -> (Tensor chosen, Tensor chosen_offsets)",
    _sample,
    _fake_sample,
)
register(
    "sample_positives",
    "(Tensor pos_start, Tensor pos_end, Tensor self_pos, SymInt k, Tensor seed) -> Tensor",
    _sample_positives,
    _fake_sample_positives,
)


# ---- keys


def _keys(key: tuple[Tensor, Tensor], pixels: Tensor, kind: str, values: Tensor | None, num_pixels: int) -> Tensor:
    """Key of every row. Random words are computed per pixel, four to a Philox block, and gathered.

    They are computed per row if the rows are few of many pixels.
    """
    if values is not None and kind == "hardest":
        return in_chunks(_hardest_keys, _at(values, pixels))
    dense = num_pixels <= 4 * pixels.numel()
    words = dense_words(key, num_pixels) if dense else words_at(key, pixels)
    if values is None or kind == "hard_easy":
        return words.index_select(0, pixels) if dense else words
    if dense:
        return in_chunks(_weighted_keys, words, values.reshape(-1)).index_select(0, pixels)
    return in_chunks(_weighted_keys, words, _at(values, pixels))


def _weighted_keys(words: Tensor, weights: Tensor) -> Tensor:
    """Keys of the exponential race; 2^32 if the weight is not positive."""
    weights = weights.to(torch.float32)
    race = _negative_log2(words).to(torch.float32) * 2.0**-40
    # A float64 quotient of two float32 numbers, rounded to float32, is the correctly rounded float32 quotient
    # (53 >= 2 * 24 + 2); a compiler's own float32 division need not be.
    race = (race.double() / weights.double()).to(torch.float32)
    return torch.where(weights > 0, _image(race), _ABSENT)


def _negative_log2(words: Tensor) -> Tensor:
    """-log2((2 r + 1) / 2^33) with 40 fraction bits, for 32-bit words r, as the module docstring defines it."""
    # 2 r + 1 is exact as a float64: its exponent field gives the leading zeros, its fraction field the normalised word.
    bits = (2 * words + 1).double().view(torch.int64)
    exponent = (1023 + 32) - (bits >> 52)
    v = (1 << 32) - ((bits >> 20) & MASK)
    q = v * _LOG2_COEFFICIENTS[7]
    for coefficient in _LOG2_COEFFICIENTS[6::-1]:
        q.bitwise_right_shift_(32).add_(coefficient).mul_(v)
    return (exponent << 40) + (q >> 22)


def _hardest_keys(scores: Tensor) -> Tensor:
    """Keys by descending score, NaN last."""
    scores = scores.to(torch.float32)
    return torch.where(scores.isnan(), MASK, _image(0.0 - scores))


def _image(values: Tensor) -> Tensor:
    """Order-preserving map of float32 to [0, 2^32), as int64."""
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + (1 << 31)) & MASK


# ---- intervals


def _group_of_row(starts: Tensor, n: int) -> Tensor:
    """Interval number + 1 of every row: 0 before the first interval, S + 1 past the last one."""
    # Counting the offsets passed handles empty intervals, and costs one scan instead of a binary search per row.
    passed = starts.new_zeros(n + 1).scatter_add(0, starts, torch.ones_like(starts))
    return passed[:n].cumsum(0)


def _live_pixels(order: Tensor, group: Tensor, num_intervals: int) -> Tensor:
    """Pixel index of every row, 0 for dead rows, whose own value must not be used as an index."""
    return torch.where((group > 0) & (group <= num_intervals), order, 0).long()


def _at(values: Tensor, pixels: Tensor) -> Tensor:
    return values.reshape(-1).index_select(0, pixels)


def _count(flags: Tensor, starts: Tensor) -> Tensor:
    """Number of set flags [N] in every interval."""
    total = torch.nn.functional.pad(_running_count(flags), (1, 0))
    return total.index_select(0, starts).diff().long()


def _running_count(flags: Tensor) -> Tensor:
    """Inclusive prefix count, in int32 if that is enough (a bool scan into int64 is ten times slower on the CPU)."""
    return flags.cumsum(0, dtype=torch.int32 if flags.numel() < 2**31 else torch.int64)


def _smallest_hard_easy(starts: Tensor, group: Tensor, keys: Tensor, hard: Tensor, k: int) -> Tensor:
    """Mask of the rows chosen by the rule of `sample_hard_easy`: each interval is two groups, wrong before right."""
    num_hard = _count(hard, starts)
    num_easy = starts.diff() - num_hard
    take_hard = torch.minimum(num_hard, (k - num_easy).clamp(min=k // 2))
    take_easy = torch.minimum(num_easy, k - take_hard)
    limit = torch.stack([starts[:-1] + take_hard, starts[:-1] + num_hard + take_easy], 1).reshape(-1)
    return _smallest(2 * group + ~hard, keys, torch.nn.functional.pad(limit, (2, 2)))


def _smallest(group: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
    """Mask of the rows that come before row limit[group] once sorted by (group, key, position)."""
    # One stable sort of 64-bit integers: positions break ties by stability. Groups keep their places, so an interval's
    # smallest elements are at its start. 33 bits hold a key or the absent mark.
    ordered, rows = torch.sort((group << 33) | keys, stable=True)
    position = torch.arange(keys.numel(), device=keys.device)
    chosen = position < limit.index_select(0, ordered >> 33)
    return torch.zeros_like(chosen).scatter(0, rows, chosen)


def _compact(order: Tensor, chosen: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The chosen rows in ascending order, and how many of them precede each interval."""
    count = _running_count(chosen)
    size = (offsets.numel() - 1) * k
    place = torch.arange(size, device=order.device, dtype=count.dtype)
    rows = torch.searchsorted(count, place, right=True).clamp(max=order.numel() - 1)
    picked = torch.where(place < count[-1], order.index_select(0, rows), 0)
    starts = torch.nn.functional.pad(count, (1, 0)).index_select(0, offsets.long())
    return picked, starts.to(offsets.dtype)
