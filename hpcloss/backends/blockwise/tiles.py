"""The primitives as PyTorch tiles: exact, O((N + M) D) memory, any device, float32 and float64.

A tile of similarities is one matmul; what a loss needs of it is reduced at once and the tile is forgotten. In
self-contrast S is symmetric, so only tiles on and above the diagonal are computed and each serves both its rows and its
columns. On the CPU the intervals are read on the host and become contiguous slices: blocks of anchors hold one class
where classes are long, so most tiles need no mask at all. On other devices nothing is read on the host; a fixed
schedule covers all pairs and masks come from the intervals.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hpcloss.backends.bounds import is_safe
from hpcloss.ops import statistics_dtype
from hpcloss.partition import Pairs

BLOCK = 512  # rows of a tile; a 512 x 512 fp32 tile is 1 MB and stays in a core's cache
LONG_RUN = 128  # anchors of one class from which a block of their own is cheaper than a mask
STATIC_BLOCK = 1024  # on a device where intervals are not read, one tile serves up to this many rows
LOG2E = math.log2(math.e)  # exp2 takes a third of the time of exp
COLUMNS = 16  # of the rows, at a time, where a float64 copy of all of them would cost memory
SOFTPLUS_LINEAR = 40.0  # above this, softplus(x) is x to the last bit in float64 too
INF, NAN = float("inf"), float("nan")


class Tile(NamedTuple):
    """Anchor rows i0:i1 against key rows j0:j1.

    mirrored: the columns are anchors too and their pairs with the rows belong to this tile (self-contrast).
    diagonal: the columns are the rows (self-contrast); both directions of a pair are inside.
    masked: some pairs of the tile are outside the rule, beyond the diagonal itself.
    """

    i0: int
    i1: int
    j0: int
    j1: int
    mirrored: bool = False
    diagonal: bool = False
    masked: bool = False


# ---------------------------------------------------------------------------------------------------- schedule


def _schedule(at: Pairs, num_keys: int, rule: str, symmetric: bool) -> Iterator[list[Tile]]:
    """Tiles that hold all pairs of the rule, grouped by block of rows."""
    if at.pos_start.device.type == "cpu":
        return _sliced_schedule(at, rule, symmetric)
    return _static_schedule(at.pos_start.numel(), num_keys, symmetric)


def _static_schedule(num_rows: int, num_keys: int, symmetric: bool) -> Iterator[list[Tile]]:
    for i0 in range(0, num_rows, STATIC_BLOCK):
        i1 = min(i0 + STATIC_BLOCK, num_rows)
        if symmetric:
            tiles = [Tile(i0, i1, i0, i1, diagonal=True, masked=True)]
            first = i1
        else:
            tiles, first = [], 0
        for j0 in range(first, num_keys, STATIC_BLOCK):
            tiles.append(Tile(i0, i1, j0, min(j0 + STATIC_BLOCK, num_keys), mirrored=symmetric, masked=True))
        if tiles:
            yield tiles


def _sliced_schedule(at: Pairs, rule: str, symmetric: bool) -> Iterator[list[Tile]]:
    runs = _run_edges(at) if rule in ("positives", "negatives") else []  # the other rules do not care
    has_self = rule != "every" and not symmetric and bool((at.self_pos >= 0).any())
    for a0, a1, k0, k1 in zip(*(bound.tolist() for bound in at.intervals()[3:]), strict=True):
        for i0, i1, pure in _row_blocks(a0, a1, runs):
            starts, ends = at.pos_start[i0:i1], at.pos_end[i0:i1]
            p0, p1 = (int(starts[0]), int(ends[0])) if pure else (int(starts.min()), int(ends.max()))
            p0 = min(max(p0, k0), k1)  # an empty interval may lie anywhere
            p1 = min(max(p1, p0), k1)
            if rule == "positives":
                spans = [(p0, p1, not pure)]
            elif rule == "negatives":
                spans = [(k0, p0, False), (p0, p1, True), (p1, k1, False)]
                if pure:
                    del spans[1]
            else:
                spans = [(k0, k1, False)]
            tiles = [tile for span in spans for tile in _cut(i0, i1, a0, a1, *span, symmetric)]
            if has_self:
                first, last = int(at.self_pos[i0:i1].min()), int(at.self_pos[i0:i1].max())
                tiles = [tile._replace(masked=tile.masked or (tile.j0 <= last and tile.j1 > first)) for tile in tiles]
            if tiles:
                yield tiles


def _run_edges(at: Pairs) -> list[int]:
    """Rows at which the positive interval changes."""
    changes = (at.pos_start[1:] != at.pos_start[:-1]) | (at.pos_end[1:] != at.pos_end[:-1])
    return (changes.nonzero().view(-1) + 1).tolist()


def _row_blocks(start: int, end: int, runs: list[int]) -> Iterator[tuple[int, int, bool]]:
    """Cut anchors start:end into blocks (i0, i1, pure); a pure block lies in one run of equal positives."""
    if start >= end:
        return
    edges = [start, *runs[bisect_right(runs, start) : bisect_left(runs, end)], end]
    pieces: list[tuple[int, int, bool]] = []  # neighbouring short runs share a piece
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        pure = last - first >= LONG_RUN or len(edges) == 2
        if not pure and pieces and not pieces[-1][2] and last - pieces[-1][0] <= BLOCK:
            pieces[-1] = (pieces[-1][0], last, False)
        else:
            pieces.append((first, last, pure))
    for first, last, pure in pieces:
        for i0, i1 in _even(first, last, BLOCK):
            yield i0, i1, pure


def _even(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """start:end in as few, nearly equal pieces of at most `most` as possible."""
    pieces = -(-(end - start) // most)
    for piece in range(pieces):
        yield start + piece * (end - start) // pieces, start + (piece + 1) * (end - start) // pieces


def _cut(i0: int, i1: int, a0: int, a1: int, c0: int, c1: int, masked: bool, symmetric: bool) -> Iterator[Tile]:
    """Tiles of rows i0:i1 and columns c0:c1. In self-contrast, anchors left of the block have already met its rows."""
    parts = [(c0, c1, False)]
    if symmetric:
        if c0 < i1 and c1 > i0:
            yield Tile(i0, i1, i0, i1, diagonal=True, masked=masked)
        parts = [(c0, min(c1, a0), False), (max(c0, i1), min(c1, a1), True), (max(c0, a1), c1, False)]
    for first, last, mirrored in parts:
        for j0, j1 in _even(first, last, BLOCK * BLOCK // (i1 - i0)):
            yield Tile(i0, i1, j0, j1, mirrored=mirrored, masked=masked)


def _allowed(tile: Tile, at: Pairs, rule: str, symmetric: bool) -> Tensor:
    """Which pairs of a masked tile the rule counts, [rows, columns]."""
    rows = slice(tile.i0, tile.i1)
    keys = torch.arange(tile.j0, tile.j1, device=at.pos_start.device)
    inside = (keys >= at.pos_start[rows, None]) & (keys < at.pos_end[rows, None])
    if rule == "positives":
        allowed = inside
    else:
        last_key = at.key_end if symmetric else at.anchor_end  # in self-contrast key rows belong to a region as well
        row_numbers = torch.arange(tile.i0, tile.i1, device=keys.device, dtype=last_key.dtype)
        region = torch.searchsorted(last_key, row_numbers, right=True)
        dead = region == last_key.numel()
        region = torch.where(dead, 0, region)
        if not symmetric:
            dead |= row_numbers < at.anchor_start[region]
        allowed = (keys >= at.key_start[region, None]) & (keys < at.key_end[region, None]) & ~dead[:, None]
        if rule == "negatives":
            allowed &= ~inside
    if rule != "every":
        allowed &= keys != at.self_pos[rows, None]
    return allowed


# -------------------------------------------------------------------------------------------------------- tiles


class _Tiles:
    """Similarity tiles of one call, each computed into the same buffer."""

    def __init__(self, anchors: Tensor, keys: Tensor | None, at: Pairs, rule: str, anchor_scale: Tensor | float = 1.0):
        self.symmetric = keys is None
        self.anchors = anchors
        self.keys = anchors if keys is None else keys
        self.at, self.rule, self.anchor_scale = at, rule, anchor_scale
        self.blocks = _schedule(at, self.keys.shape[0], rule, self.symmetric)
        self.buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile with its similarities times `anchor_scale`; the next tile overwrites them."""
        for block in self.blocks:
            rows = self.anchors[block[0].i0 : block[0].i1] * self.anchor_scale
            for tile in block:
                keys = self.keys[tile.j0 : tile.j1]
                yield tile, torch.mm(rows, keys.T, out=self.buffer("similarity", tile))

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """Memory of the tile's shape; the next tile that asks for the same name overwrites it."""
        shape = (tile.i1 - tile.i0, tile.j1 - tile.j0)
        held = self.buffers.get(name)
        if held is None or held.numel() < shape[0] * shape[1]:
            held = self.buffers[name] = self.anchors.new_empty(shape[0] * shape[1])
        return held[: shape[0] * shape[1]].view(shape)

    def exclude(self, tile: Tile, values: Tensor, fill: float) -> Tensor:
        """Overwrite the pairs of the tile that the rule does not count."""
        if tile.masked:
            values.masked_fill_(~_allowed(tile, self.at, self.rule, self.symmetric), fill)
        elif tile.diagonal and self.rule != "every":
            values.fill_diagonal_(fill)
        return values

    def scatter(self, tile: Tile, slope: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None) -> None:
        """Add slope @ keys to the rows and slope.T @ anchors to the columns (a diagonal tile's rows have both)."""
        if d_anchors is not None:
            d_anchors[tile.i0 : tile.i1].addmm_(slope, self.keys[tile.j0 : tile.j1])
        if d_keys is not None and not tile.diagonal:
            d_keys[tile.j0 : tile.j1].addmm_(slope.T, self.anchors[tile.i0 : tile.i1])


def _accumulation(anchors: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype of the arithmetic: fp32, or float64 for float64 rows."""
    dtype = statistics_dtype(anchors.dtype)
    return anchors.to(dtype), None if keys is None else keys.to(dtype)


def _is_safe(
    anchors: Tensor, keys: Tensor | None, scale_bound: float | None, *, twice: bool = False, margin: float = 0.0
) -> bool:
    count = (anchors if keys is None else keys).shape[0]
    return is_safe(count, scale_bound, anchors.dtype, twice=twice, margin=margin)


def _gradients(
    anchors: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None, d_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator's results; what was not asked for is an empty tensor of its own."""
    return (
        anchors.new_empty(0) if d_anchors is None else d_anchors,
        anchors.new_empty(0) if d_keys is None else d_keys,
        d_scale,
    )


# ----------------------------------------------------------------------------------------------------- pair_lse


def pair_lse(
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
) -> Tensor:
    """lse_i = log sum_{j in rule(i)} exp(scale s_ij + bias_j) [N]; -inf for an empty set and where no anchor is."""
    at = Pairs.from_intervals(intervals)
    anchors, keys = _accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if bias is None and _is_safe(anchors, keys, scale_bound):
        total = anchors.new_zeros(anchors.shape[0])
        tiles = _Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            terms = tiles.exclude(tile, logits.exp2_(), 0.0)
            total[tile.i0 : tile.i1] += terms.sum(1)
            if tile.mirrored:
                total[tile.j0 : tile.j1] += terms.sum(0)
        lse = total.log_()
    else:
        lse = anchors.new_full(anchors.shape[:1], -INF)
        tiles = _Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            toward = logits if bias is None else logits + bias[columns]
            lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(toward, 1))
            if tile.mirrored:
                toward = logits if bias is None else logits + bias[rows, None]
                lse[columns] = torch.logaddexp(lse[columns], torch.logsumexp(toward, 0))
    return lse.masked_fill_(~at.is_anchor(), -INF)


def pair_lse_backward(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    rule: str,
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i scale exp(scale s_ij + bias_j - lse_i), as d anchors, d keys (one sum in self-contrast), d scale."""
    at = Pairs.from_intervals(intervals)
    anchors, keys = _accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    empty = lse == -INF
    grad = torch.where(empty, 0.0, grad.to(anchors.dtype))
    if bias is None and _is_safe(anchors, keys, scale_bound, twice=True):
        # One exponential serves both directions: exp(l - lse_i) = exp(l) exp(-lse_i).
        factor = grad * torch.exp(-torch.where(empty, 0.0, lse))
        tiles = _Tiles(anchors, keys, at, rule, scale * LOG2E)
        for tile, logits in tiles:
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            factors = factor[rows, None]
            if tile.mirrored or tile.diagonal:
                factors = torch.add(factors, factor[columns], out=tiles.buffer("factors", tile))
            slope = tiles.exclude(tile, logits.exp2_().mul_(factors), 0.0)
            tiles.scatter(tile, slope, d_anchors, d_keys)
    else:
        lse = torch.where(empty, INF, lse)  # exp(. - inf) = 0
        tiles = _Tiles(anchors, keys, at, rule, scale)
        for tile, logits in tiles:
            tiles.exclude(tile, logits, -INF)
            rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
            toward = logits - lse[rows, None]
            if bias is not None:
                toward += bias[columns]
            slope = toward.exp_().mul_(grad[rows, None])
            if tile.mirrored or tile.diagonal:
                back = logits.sub_(lse[columns])
                if bias is not None:
                    back += bias[rows, None]
                slope.addcmul_(back.exp_(), grad[columns])
            tiles.scatter(tile, slope, d_anchors, d_keys)
    d_scale = anchors.new_zeros(())
    if d_anchors is not None:
        if needs_scale:
            # S depends on the scale as on the anchors' length; in self-contrast d holds both sides of each pair.
            d_scale = (anchors * d_anchors).sum() / (2 if keys is None else 1)
        d_anchors *= scale
    if keys is not None and d_keys is not None:
        d_keys *= scale
    return _gradients(anchors, d_anchors if needs_anchors else None, None if keys is None else d_keys, d_scale)


def pair_lse_both(
    anchors: Tensor, keys: Tensor, scale: Tensor, scale_bound: float | None, intervals: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """lse over the keys of each anchor [N] and over the anchors of each key [M], from one S; -inf for an empty set."""
    anchors = anchors.to(statistics_dtype(anchors.dtype))
    keys = keys.to(anchors.dtype)
    rows, columns = anchors.new_full(anchors.shape[:1], -INF), keys.new_full(keys.shape[:1], -INF)
    tiles = _Tiles(anchors, keys, Pairs.from_intervals(intervals), "every", scale.to(anchors.dtype))
    safe = all(_is_safe(side, None, scale_bound) for side in (anchors, keys))
    if safe:
        rows.zero_()
        columns.zero_()
    for tile, logits in tiles:
        row, column = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        if safe:
            terms = tiles.exclude(tile, logits.exp_(), 0.0)
            rows[row] += terms.sum(1)
            columns[column] += terms.sum(0)
        else:
            tiles.exclude(tile, logits, -INF)
            rows[row] = torch.logaddexp(rows[row], torch.logsumexp(logits, 1))
            columns[column] = torch.logaddexp(columns[column], torch.logsumexp(logits, 0))
    return (rows.log_(), columns.log_()) if safe else (rows, columns)


def pair_lse_both_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    anchors: Tensor,
    keys: Tensor,
    scale: Tensor,
    scale_bound: float | None,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = scale (g_i exp(scale s_ij - row_i) + h_j exp(scale s_ij - column_j)), as d anchors, d keys, d scale."""
    anchors = anchors.to(statistics_dtype(anchors.dtype))
    keys = keys.to(anchors.dtype)
    scale = scale.to(anchors.dtype)
    d_anchors = torch.zeros_like(anchors) if needs_anchors or needs_scale else None
    d_keys = torch.zeros_like(keys) if needs_keys else None
    sides = [(grad_rows, rows), (grad_columns, columns)]
    grad_rows, grad_columns = (torch.where(lse == -INF, 0.0, grad.to(anchors.dtype)) for grad, lse in sides)
    rows, columns = (torch.where(lse == -INF, INF, lse) for _, lse in sides)
    tiles = _Tiles(anchors, keys, Pairs.from_intervals(intervals), "every", scale)
    for tile, logits in tiles:
        row, column = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        slope = torch.exp(logits - rows[row, None]).mul_(grad_rows[row, None])
        slope += torch.exp(logits - columns[column]).mul_(grad_columns[column])
        tiles.scatter(tile, tiles.exclude(tile, slope, 0.0), d_anchors, d_keys)
    d_scale = anchors.new_zeros(())
    if d_anchors is not None:
        if needs_scale:
            d_scale = (anchors * d_anchors).sum()  # S depends on the scale as on the anchors' length
        d_anchors *= scale
    if d_keys is not None:
        d_keys *= scale
    return _gradients(anchors, d_anchors if needs_anchors else None, d_keys, d_scale)


# ---------------------------------------------------------------------------------------------------- pair_mean


def pair_mean(
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    intervals: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """out_i = sum_{j in positives(i)} w_ij t_ij, w = softmax over the positives of (-hardness s_ij + log_weight_j).

    t = scale s without `stat` (term "logit"), else t = softplus(stat_i - (scale - discount) s) - discount s ("own").
    Also returns the weights' lse ("mass", -inf for an empty set) and slope_i = d out_i / d stat_i, all [N].
    """
    at = Pairs.from_intervals(intervals)
    anchors, keys = _accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    if stat is not None and log_weight is None:
        margin = 2 * abs(discount) + abs(hardness)
        if _is_safe(anchors, keys, scale_bound, twice=True, margin=margin):
            return _own_mean(anchors, keys, stat, scale, hardness, discount, at)
    mass = _weight_mass(anchors, keys, log_weight, hardness, at)
    out, slope = torch.zeros_like(mass), torch.zeros_like(mass)
    if _is_linear(anchors, keys, stat, log_weight, hardness):
        return scale * _linear_mean(anchors, mass, at), mass, slope
    weights = _Weights(mass, log_weight, hardness)
    tiles = _Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        for side in _sides(tile, both=tile.mirrored):
            weight = weights(similarity, side)
            if stat is None:
                out[side.own] += tiles.exclude(tile, weight * similarity, 0.0).sum(side.dim) * scale
                continue
            logits = side.along(stat) - similarity * (scale - discount)
            terms = softplus(logits, threshold=SOFTPLUS_LINEAR)
            if discount:
                terms -= discount * similarity
            out[side.own] += tiles.exclude(tile, terms.mul_(weight), 0.0).sum(side.dim)
            slope[side.own] += tiles.exclude(tile, logits.sigmoid_().mul_(weight), 0.0).sum(side.dim)
    return out, mass, slope


def pair_mean_backward(
    grad: Tensor,
    out: Tensor,
    mass: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor | None,
    log_weight: Tensor | None,
    scale: Tensor,
    scale_bound: float | None,
    hardness: float,
    discount: float,
    detach_weights: bool,
    intervals: list[Tensor],
    needs_anchors: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS_ij = g_i w_ij (dt/ds - hardness (t_ij - out_i), the second part unless weights are detached)."""
    at = Pairs.from_intervals(intervals)
    anchors, keys = _accumulation(anchors, keys)
    scale = scale.to(anchors.dtype)
    grad = torch.where(mass == -INF, 0.0, grad.to(anchors.dtype))
    d_scale = anchors.new_zeros(())
    differentiated = hardness != 0 and not detach_weights
    if _is_linear(anchors, keys, stat, log_weight, hardness):
        d_rows = _linear_mean_backward(grad, anchors, mass, at).mul_(scale) if needs_anchors else None
        return _gradients(anchors, d_rows, None, (grad * out).sum() / scale if needs_scale else d_scale)
    d_anchors = torch.zeros_like(anchors) if needs_anchors else None
    d_keys = d_anchors if keys is None else torch.zeros_like(keys) if needs_keys else None
    if stat is not None and log_weight is None and not differentiated and not needs_scale:
        margin = 2 * abs(discount) + abs(hardness)
        if _is_safe(anchors, keys, scale_bound, twice=True, margin=margin):
            factor = grad * torch.exp(-_finite_mass(mass))
            _own_mean_backward(factor, anchors, keys, stat, scale, hardness, discount, at, d_anchors, d_keys)
            return _gradients(anchors, d_anchors, None if keys is None else d_keys, d_scale)
    weights = _Weights(mass, log_weight, hardness)
    tiles = _Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        slopes = []
        for side in _sides(tile, both=tile.mirrored or tile.diagonal):
            weight = weights(similarity, side) * side.along(grad)
            if stat is None:
                terms = similarity * scale if differentiated else None
                by_scale, slope = weight * similarity if needs_scale else None, weight * scale
            else:
                logits = side.along(stat) - similarity * (scale - discount)
                terms = softplus(logits, threshold=SOFTPLUS_LINEAR) if differentiated else None
                if terms is not None and discount:
                    terms -= discount * similarity
                share = logits.sigmoid_().mul_(weight)
                by_scale = share * -similarity if needs_scale else None
                slope = share.mul_(discount - scale)
                if discount:
                    slope -= discount * weight
            if terms is not None:
                slope = slope + weight * terms.sub_(side.along(out)).mul_(-hardness)
            if by_scale is not None and (side.dim == 1 or tile.mirrored):
                d_scale += tiles.exclude(tile, by_scale, 0.0).sum()
            slopes.append(slope)
        # Constant slopes are broadcast; the rule is symmetric, so one mask serves both directions.
        total = torch.add(*slopes) if len(slopes) == 2 else slopes[0]
        total = tiles.exclude(tile, total.expand_as(similarity).contiguous(), 0.0)
        tiles.scatter(tile, total, d_anchors, d_keys)
    return _gradients(anchors, d_anchors, None if keys is None else d_keys, d_scale)


def _own_mean(
    anchors: Tensor, keys: Tensor | None, stat: Tensor, scale: Tensor, hardness: float, discount: float, at: Pairs
) -> tuple[Tensor, Tensor, Tensor]:
    """The "own" term where nothing can overflow: one pass, and both directions of a tile share the exponentials.

    With y_ij = exp(stat_i) exp(-(scale - discount) s_ij): t_ij = log(1 + y_ij) - discount s_ij, dt/dstat = y / (1 + y).
    """
    out, slope, mass = (anchors.new_zeros(anchors.shape[0]) for _ in range(3))
    push = torch.exp(stat.to(anchors.dtype))
    tiles = _Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        decay = torch.mul(similarity, (discount - scale) * LOG2E, out=tiles.buffer("decay", tile)).exp2_()
        weight = None
        if hardness:
            weight = torch.mul(similarity, -hardness * LOG2E, out=tiles.buffer("weight", tile)).exp2_()
            tiles.exclude(tile, weight, 0.0)
        for side in _sides(tile, both=tile.mirrored):
            ratio = torch.mul(decay, side.along(push), out=tiles.buffer("ratio", tile))
            terms = torch.log1p(ratio, out=tiles.buffer("terms", tile))
            if discount:
                terms.sub_(similarity, alpha=discount)
            share = ratio.div_(torch.add(ratio, 1.0, out=tiles.buffer("denominator", tile)))
            for values, total in ((terms, out), (share, slope)):
                values = tiles.exclude(tile, values, 0.0) if weight is None else values.mul_(weight)
                total[side.own] += values.sum(side.dim)
            if weight is not None:
                mass[side.own] += weight.sum(side.dim)
    mass = mass.log_() if hardness else _weight_mass(anchors, keys, None, 0.0, at)
    mass.masked_fill_(~at.is_anchor(), -INF)
    share_of_one = torch.exp(-_finite_mass(mass))
    return out.mul_(share_of_one), mass, slope.mul_(share_of_one)


def _own_mean_backward(
    factor: Tensor,
    anchors: Tensor,
    keys: Tensor | None,
    stat: Tensor,
    scale: Tensor,
    hardness: float,
    discount: float,
    at: Pairs,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
) -> None:
    """dS_ij = -factor_i weight_ij ((scale - discount) y_ij / (1 + y_ij) + discount), added to d_anchors and d_keys.

    factor_i: incoming gradient over the sum of the unnormalised weights.
    """
    push = torch.exp(stat.to(anchors.dtype))
    pull = factor * push * (discount - scale)
    one = anchors.new_ones(())
    tiles = _Tiles(anchors, keys, at, "positives")
    for tile, similarity in tiles:
        decay = torch.mul(similarity, (discount - scale) * LOG2E, out=tiles.buffer("decay", tile)).exp2_()
        slopes = []
        for side in _sides(tile, both=tile.mirrored or tile.diagonal):
            # pull y / (push (1 + y)), with y / push = decay multiplied in once for both directions
            slope = torch.addcmul(one, decay, side.along(push), out=tiles.buffer(f"slope{side.dim}", tile))
            slopes.append(torch.div(side.along(pull), slope, out=slope))
        total = slopes[0].add_(slopes[1]) if len(slopes) == 2 else slopes[0]
        total.mul_(decay)
        if discount:
            for side in _sides(tile, both=tile.mirrored or tile.diagonal):
                total.sub_(side.along(factor), alpha=discount)
        if hardness:
            total.mul_(similarity.mul_(-hardness * LOG2E).exp2_())
        tiles.scatter(tile, tiles.exclude(tile, total, 0.0), d_anchors, d_keys)


def _is_linear(
    anchors: Tensor, keys: Tensor | None, stat: Tensor | None, log_weight: Tensor | None, hardness: float
) -> bool:
    """Whether class sums suffice. Their prefix sums are refused on a GPU where only deterministic kernels may run."""
    refused = anchors.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()
    return stat is None and hardness == 0 and log_weight is None and keys is None and not refused


def _weight_mass(anchors: Tensor, keys: Tensor | None, log_weight: Tensor | None, hardness: float, at: Pairs) -> Tensor:
    """log sum over the positives of exp(-hardness s_ij + log_weight_j); the log of their number where both are 0."""
    if hardness == 0 and log_weight is None:
        return at.counts()[0].to(anchors.dtype).log()
    scale = torch.full((), -hardness, dtype=anchors.dtype, device=anchors.device)  # new_tensor would wait for the copy
    return pair_lse(anchors, keys, log_weight, scale, None, list(at.intervals()), "positives")


class _Side(NamedTuple):
    """One direction of a tile: statistics of the anchors `own` lie along its rows (dim 1 summed) or columns (dim 0)."""

    own: slice
    other: slice
    dim: int

    def along(self, values: Tensor) -> Tensor:
        return values[self.own, None] if self.dim == 1 else values[self.own]

    def across(self, values: Tensor) -> Tensor:
        return values[self.other] if self.dim == 1 else values[self.other, None]


def _sides(tile: Tile, both: bool) -> list[_Side]:
    rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
    return [_Side(rows, columns, 1), _Side(columns, rows, 0)][: 2 if both else 1]


class _Weights:
    """w_ij of a tile, normalised: exp(-hardness s_ij + log_weight_j - mass_i); one number a row where constant."""

    def __init__(self, mass: Tensor, log_weight: Tensor | None, hardness: float):
        self.mass = _finite_mass(mass)
        self.log_weight, self.hardness = log_weight, hardness

    def __call__(self, similarity: Tensor, side: _Side) -> Tensor:
        exponent = -side.along(self.mass)
        if self.hardness != 0:
            exponent = exponent - self.hardness * similarity
        if self.log_weight is not None:
            exponent = exponent + side.across(self.log_weight)
        return exponent.exp()


def _finite_mass(mass: Tensor) -> Tensor:
    """With -inf replaced by inf, so that exp(. - mass) is 0 for an empty set."""
    return torch.where(mass == -INF, INF, mass)


def _linear_mean(rows: Tensor, mass: Tensor, at: Pairs) -> Tensor:
    """Mean of <row, positive> over the positives of each row in self-contrast: their sum suffices, no pair is met."""
    out = rows.new_zeros(rows.shape[0])
    runs = _long_runs(at)
    if runs is None:
        for part in rows.split(COLUMNS, 1):
            out += (part * _positive_sums(part, at)).sum(1)
    else:
        for i0, i1, p0, p1 in runs:
            torch.mv(rows[i0:i1], rows[p0:p1].sum(0), out=out[i0:i1])
        out -= _squares(rows) * at.self_is_positive()
    return out.mul_(torch.exp(-_finite_mass(mass)))


def _linear_mean_backward(grad: Tensor, rows: Tensor, mass: Tensor, at: Pairs) -> Tensor:
    """Gradient of `_linear_mean`; a pair counts once for anchor i and, if j is an anchor too, once for anchor j."""
    per_pair = grad * torch.exp(-_finite_mass(mass))
    runs = _long_runs(at)
    if runs is None:
        d_rows = torch.empty_like(rows)
        for part, d_part in zip(rows.split(COLUMNS, 1), d_rows.split(COLUMNS, 1)):
            d_part.copy_(_positive_sums(part, at).mul_(per_pair[:, None]))
            d_part += _positive_sums(part * per_pair[:, None], at)
        return d_rows
    d_rows = rows * (-2 * per_pair * at.self_is_positive())[:, None]
    for i0, i1, p0, p1 in runs:
        d_rows[i0:i1].addr_(per_pair[i0:i1], rows[p0:p1].sum(0))
        d_rows[p0:p1] += torch.mv(rows[i0:i1].T, per_pair[i0:i1])
    return d_rows


def _long_runs(at: Pairs) -> list[tuple[int, int, int, int]] | None:
    """(first row, end, first positive, end) of each run of rows with equal positives, if there are few; CPU only."""
    if at.pos_start.device.type != "cpu":
        return None
    edges = [0, *_run_edges(at), at.pos_start.numel()]
    if len(edges) > 16 and (len(edges) - 1) * 64 > at.pos_start.numel():
        return None
    return [(i0, i1, int(at.pos_start[i0]), int(at.pos_end[i0])) for i0, i1 in zip(edges[:-1], edges[1:]) if i1 > i0]


def _squares(rows: Tensor) -> Tensor:
    """|row|^2 [N], a few rows at a time."""
    return torch.cat([(part * part).sum(1) for part in rows.split(1 << 12)]) if rows.shape[0] else rows.new_zeros(0)


def _positive_sums(rows: Tensor, at: Pairs) -> Tensor:
    """Sum of the positives of each row in self-contrast, by prefix sums in float64.

    Infinite and NaN rows stay in the intervals that hold them.
    """
    start, end = at.pos_start.long(), at.pos_end.long()
    broken = ~rows.isfinite().all(1)
    rows = torch.where(broken[:, None], 0.0, rows)
    broken_before = torch.nn.functional.pad(broken.cumsum(0), (1, 0))
    prefix = torch.nn.functional.pad(rows.double().cumsum(0), (0, 0, 1, 0))
    sums = (prefix[end] - prefix[start]).to(rows.dtype)
    sums -= rows * at.self_is_positive()[:, None]
    return sums.masked_fill_((broken_before[end] > broken_before[start])[:, None], NAN)
