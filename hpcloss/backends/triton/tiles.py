"""The parts of every pair kernel: the tiles that a block of rows meets, the pairs of a tile that count, and arithmetic.

A program owns a block of rows of one side and streams tiles of the other. For each region that it meets it reads the
hull of its rows' intervals. The hull gives the tiles to visit, and whether a tile needs a mask.

Kernels take related arguments as one NamedTuple. A missing member is None, and the compiler leaves out the code that
would read it. Numbers of rows stay arguments of their own: Triton cannot be told not to specialise a kernel on
multiples of 16 for a member of a tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
FARTHEST = tl.constexpr(2**31 - 1)
SCAN, LONG_SCAN = tl.constexpr(256), tl.constexpr(1024)  # intervals read together


# ---------------------------------------------------------------------------------------------- groups of arguments


class Intervals(NamedTuple):
    """The pairs that count: positives of each anchor [N], and regions [R], whose own rows meet their other rows.

    A program owns rows of one side and streams the other. For own anchors the first seven fields are those of
    `Pairs.intervals`.
    """

    pos_start: Any
    pos_end: Any
    self_pos: Any  # the key that is the anchor itself, -1 for none
    own_start: Any
    own_end: Any
    other_start: Any = None
    other_end: Any = None
    anchor_start: Any = None  # the anchors in self-contrast, where all own and other rows are keys
    anchor_end: Any = None


class Coefficients(NamedTuple):
    """Coefficients of weights and slopes. None: a loss has none."""

    key_bias: Any  # [M], added to exponents
    scale: Any  # one number
    hardness: Any = None  # a number; None: uniform weights
    pull: Any = None  # -hardness if weights are differentiated
    discount: Any = None  # a number, subtracted from the scale of a positive
    lift: Any = None  # one number, the factor of fp16 slopes


# ---------------------------------------------------------------------------------------------------- intervals


class Positives(NamedTuple):
    """The `Intervals` of some rows, as loaded."""

    start: Any
    end: Any
    self_key: Any


class Hull(NamedTuple):
    """The hulls of the positives and of the own keys of a block of rows, and the positives that all its rows share.

    Empty intervals end at 0.
    """

    outer_start: Any  # the smallest interval that holds all positives
    outer_end: Any
    inner_start: Any  # the keys that are positives of every row
    inner_end: Any
    self_start: Any  # the smallest interval that holds all rows' own keys
    self_end: Any


class Spans(NamedTuple):
    """Keys that a block of rows visits: begin:stop without hole:rest."""

    begin: Any
    stop: Any
    hole: Any
    rest: Any


@triton.jit
def meeting(starts, ends, count, first, last):
    """Range of the intervals [starts, ends), in ascending order, that meet rows first:last."""
    # Both bounds are counts of the intervals before them. Each trip narrows them 256 times.
    trips = 1
    if count > 2**8:
        trips = 2
    if count > 2**16:
        trips = 3
    if count > 2**24:
        trips = 4
    low, high = 0, 0
    for trip in range(trips):
        step = 1 << (8 * (trips - 1 - trip))
        ahead = tl.arange(0, SCAN) * step + (step - 1)
        # From 2^24 intervals on the farthest numbers overflow and are negative.
        of_end, of_start = low + ahead, high + ahead
        end = tl.load(ends + of_end, mask=(of_end >= 0) & (of_end < count), other=FARTHEST)
        start = tl.load(starts + of_start, mask=(of_start >= 0) & (of_start < count), other=FARTHEST)
        low += tl.sum((end <= first).to(tl.int32)) * step
        high += tl.sum((start < last).to(tl.int32)) * step
    return low, high


@triton.jit
def meeting_in_any_order(starts, ends, count, first, last):
    """Hull of the intervals [starts, ends) that meet rows first:last; 0:0 if none does.

    No loop may start at FARTHEST: a compiler that prefetches adds to it, and the sum overflows.
    """
    # Scalars: if this loop carries vectors, the compiler does not pipeline the loop over tiles.
    low, high = FARTHEST, 0
    for begin in range(0, count, LONG_SCAN):
        number = begin + tl.arange(0, LONG_SCAN)
        start = tl.load(starts + number, mask=number < count, other=FARTHEST)
        end = tl.load(ends + number, mask=number < count, other=0)
        meets = (start < last) & (end > first) & (start < end)
        low = tl.minimum(low, tl.min(tl.where(meets, number, FARTHEST)))
        high = tl.maximum(high, tl.max(tl.where(meets, number + 1, 0)))
    return tl.minimum(low, high), high


@triton.jit
def block_of(num_rows, BLOCK: tl.constexpr):
    """The rows of this program: the first one, all of them, and whether each exists."""
    first_row = tl.program_id(0) * BLOCK
    rows = first_row + tl.arange(0, BLOCK)
    return first_row, rows, rows < num_rows


@triton.jit
def regions_met(intervals, num_regions, first_row, BLOCK: tl.constexpr):
    """Range of the regions that meet a block of own rows; they ascend."""
    return meeting(intervals.own_start, intervals.own_end, num_regions, first_row, first_row + BLOCK)


@triton.jit
def in_region(intervals, region, first_row, rows, BLOCK: tl.constexpr):
    """Whether each own row of a block is in the region, and whether the whole block is."""
    first, last = tl.load(intervals.own_start + region), tl.load(intervals.own_end + region)
    return (rows >= first) & (rows < last), (first_row >= first) & (first_row + BLOCK <= last)


@triton.jit
def others_met(intervals, region):
    """First row of the other side in a region, and the row after its last."""
    return tl.load(intervals.other_start + region), tl.load(intervals.other_end + region)


@triton.jit
def row_intervals(intervals, rows, there):
    """The positives and own key of each row. A row that does not exist has an empty interval and no key."""
    start = tl.load(intervals.pos_start + rows, mask=there, other=0)
    end = tl.load(intervals.pos_end + rows, mask=there, other=0)
    self_key = tl.load(intervals.self_pos + rows, mask=there, other=-1)
    return Positives(start, end, self_key)


@triton.jit
def column_intervals(intervals, columns, there):
    """As `row_intervals`, for the columns of a tile. A column that does not exist has zeros.

    One load of a table. Triton 3.6 makes a load per thread and entry of a vector that is shorter than a program.
    """
    which = tl.arange(0, 4)[None, :]
    bound = tl.where(which == 0, intervals.pos_start, tl.where(which == 1, intervals.pos_end, intervals.self_pos))
    four = tl.load(bound + columns[:, None], mask=there[:, None], other=0)
    even, odd = tl.split(tl.reshape(four, [four.shape[0], 2, 2]))
    start, self_key = tl.split(even)
    end, _ = tl.split(odd)
    return Positives(start, end, self_key)


@triton.jit
def number_of_positives(start, end, self_key):
    """Number of positives of each row, as fp32."""
    return (end - start - tl.where((self_key >= start) & (self_key < end), 1, 0)).to(tl.float32)


@triton.jit
def hull_of(positives, member):
    """The hull of the member rows' positives."""
    start, end, self_key = positives
    filled = member & (start < end)
    # One reduction of all six, because each reduction has its own barriers.
    outer_start, outer_end, inner_start, inner_end, self_start, self_end = tl.reduce(
        (
            tl.where(filled, start, FARTHEST), tl.where(filled, end, 0),
            tl.where(member, start, 0), tl.where(member, end, FARTHEST),
            tl.where(member & (self_key >= 0), self_key, FARTHEST), tl.where(member, self_key + 1, 0),
        ),
        0, joined_hulls,
    )  # fmt: skip
    return Hull(outer_start, outer_end, inner_start, inner_end, self_start, self_end)


@triton.jit
def joined_hulls(
    outer_start, outer_end, inner_start, inner_end, self_start, self_end,
    other_outer_start, other_outer_end, other_inner_start, other_inner_end, other_self_start, other_self_end,
):  # fmt: skip
    return (
        tl.minimum(outer_start, other_outer_start), tl.maximum(outer_end, other_outer_end),
        tl.maximum(inner_start, other_inner_start), tl.minimum(inner_end, other_inner_end),
        tl.minimum(self_start, other_self_start), tl.maximum(self_end, other_self_end),
    )  # fmt: skip


@triton.jit
def spans_of(hull, start, end, RULE: tl.constexpr):
    """The keys of start:end that a rule can count, as two spans.

    The second span is empty unless there is a hole in the middle. No bound is beyond `end`, even if the positives have
    none (see `meeting_in_any_order`). Both are empty if no row of the block is in the region, because the shared
    positives are then everything.
    """
    end = tl.where(hull.inner_end == FARTHEST, start, end)
    if RULE == "positives":
        end = tl.minimum(hull.outer_end, end)
        start = tl.minimum(tl.maximum(hull.outer_start, start), end)
    hole, rest = end, end
    if RULE == "negatives":
        if hull.inner_start < hull.inner_end:
            hole = tl.minimum(tl.maximum(hull.inner_start, start), end)
            rest = tl.minimum(tl.maximum(hull.inner_end, start), end)
    return Spans(start, end, tl.maximum(hole, start), rest)


@triton.jit
def tile_of(spans, tile, before, BLOCK_J: tl.constexpr):
    """Key bounds first:last of a tile of the spans. `before` keys are before the hole."""
    first = tl.where(tile < before, spans.begin + tile * BLOCK_J, spans.rest + (tile - before) * BLOCK_J)
    return first, tl.where(tile < before, spans.hole, spans.stop)


@triton.jit
def is_clean(hull, first, last, RULE: tl.constexpr):
    """Whether every pair of the block's rows and keys first:last counts. All are in the region."""
    clean = True
    if RULE != "every":
        clean = (last <= hull.self_start) | (first >= hull.self_end)
    if RULE == "positives":
        clean = clean & (first >= hull.inner_start) & (last <= hull.inner_end)
    if RULE == "negatives":
        clean = clean & ((last <= hull.outer_start) | (first >= hull.outer_end))
    return clean


@triton.jit
def has_positives(hull, first, last):
    """Whether keys first:last may be positives of the block's rows."""
    return (first < hull.outer_end) & (last > hull.outer_start)


@triton.jit
def counts(start, end, self_key, keys, RULE: tl.constexpr):
    """Whether the rule counts each pair of anchors and keys of one region. The intervals are those of the anchors."""
    inside = (keys >= start) & (keys < end)
    if RULE == "positives":
        counted = inside & (keys != self_key)
    elif RULE == "negatives":
        counted = (~inside) & (keys != self_key)
    elif RULE == "others":
        counted = keys != self_key
    else:
        counted = keys == keys
    return counted


@triton.jit
def rows_count(positives, keys, RULE: tl.constexpr):
    """`counts` of all pairs of rows and columns, with the rows as anchors."""
    start, end, self_key = positives
    return counts(start[:, None], end[:, None], self_key[:, None], keys[None, :], RULE)


@triton.jit
def columns_count(positives, rows, RULE: tl.constexpr):
    """`counts` of all pairs of rows and columns, with the columns as anchors and the rows as keys."""
    start, end, self_key = positives
    return counts(start[None, :], end[None, :], self_key[None, :], rows[:, None], RULE)


@triton.jit
def rows_count_read(intervals, rows, there, keys, RULE: tl.constexpr):
    """`rows_count` with the rows' intervals read again.

    Loads keep a branch a branch. Without them the compiler computes both ways for every tile and selects.
    """
    return rows_count(row_intervals(intervals, rows, there), keys, RULE)


# ------------------------------------------------------------------------------------------------------- memory


@triton.jit
def load_rows(pointer, rows, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [., D] as a tile [., BLOCK_D], with zeros for rows and channels that do not exist."""
    channels = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D != D:
        mask = mask & (channels < D)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * D + channels[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, rows, there, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile [., BLOCK_D] to rows [., D]."""
    channels = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D != D:
        mask = mask & (channels < D)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * D + channels[None, :], values, mask=mask)


@triton.jit
def load_statistics(pointer, rows, there):
    """The four statistics of each row, read as one 16-byte piece. Each primitive has its own names for them."""
    four = tl.load(pointer + rows.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], mask=there[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(four, [four.shape[0], 2, 2]))
    column_0, column_2 = tl.split(even)
    column_1, column_3 = tl.split(odd)
    return column_0, column_1, column_2, column_3


# --------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def reciprocal(x):
    """1 / x of a positive number, in one special-function operation; a division takes many."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def softplus(x):
    """log2(1 + 2^x) and its derivative, the logistic function of x ln 2; finite for every x, relative error up to 3e-7.

    log2(1 + e) for e in [0, 1] is e times a minimax polynomial: multiply-adds are idle while exponentials are not.
    """
    small = tl.exp2(-tl.abs(x))
    series = 0.007548918672912497
    series = series * small - 0.04256596795513302
    series = series * small + 0.11285432994549677
    series = series * small - 0.1971172941328987
    series = series * small + 0.2756405595083689
    series = series * small - 0.3584082284854999
    series = series * small + 0.4806929207662173
    series = series * small - 0.7213402055947025
    series = series * small + 1.4426949973892726
    return series * small + tl.maximum(x, 0.0), tl.where(x < 0, small, 1.0) * reciprocal(1.0 + small)


@triton.jit
def similarities(x, y, PRECISION: tl.constexpr):
    """<x_i, y_j> of two tiles of rows, fp32."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)
