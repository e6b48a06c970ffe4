"""What every pair kernel is made of: which tiles a block of rows meets, which pairs of a tile count, and arithmetic.

A program owns a block of rows of one side and streams tiles of the other. For each region it meets it reads the hull of
its rows' intervals, from which follow the tiles to visit and whether a tile needs a mask at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
FARTHEST = tl.constexpr(2**31 - 1)
SCAN, LONG_SCAN = tl.constexpr(256), tl.constexpr(1024)  # intervals looked at together


# ---------------------------------------------------------------------------------------------------- intervals


@triton.jit
def meeting(starts, ends, count, first, last):
    """Range of the intervals [starts, ends), in ascending order, that meet rows first:last."""
    # Both bounds are counts of what lies before them. Each trip narrows them 256 times.
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
        # Of 2^24 intervals and more the farthest numbers wrap around and are negative.
        of_end, of_start = low + ahead, high + ahead
        end = tl.load(ends + of_end, mask=(of_end >= 0) & (of_end < count), other=FARTHEST)
        start = tl.load(starts + of_start, mask=(of_start >= 0) & (of_start < count), other=FARTHEST)
        low += tl.sum((end <= first).to(tl.int32)) * step
        high += tl.sum((start < last).to(tl.int32)) * step
    return low, high


@triton.jit
def meeting_in_any_order(starts, ends, count, first, last):
    """Hull of the intervals [starts, ends) that meet rows first:last; 0:0 where none does.

    No loop may start at FARTHEST: a compiler that loads ahead adds to it, and that wraps around.
    """
    # Scalars: with vectors carried through this loop the compiler no longer pipelines the one over tiles.
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
def row_intervals(pos_start, pos_end, self_pos, rows, there):
    """Interval of the positives and own key of each row; an empty interval and no key where no row is."""
    start = tl.load(pos_start + rows, mask=there, other=0)
    end = tl.load(pos_end + rows, mask=there, other=0)
    own = tl.load(self_pos + rows, mask=there, other=-1)
    return start, end, own


@triton.jit
def column_intervals(pos_start, pos_end, self_pos, columns, there):
    """As `row_intervals`, for the columns of a tile; all zero where no column is.

    One load of a table: of a vector shorter than a program Triton 3.6 makes a load for each thread and entry.
    """
    which = tl.arange(0, 4)[None, :]
    bound = tl.where(which == 0, pos_start, tl.where(which == 1, pos_end, self_pos))
    four = tl.load(bound + columns[:, None], mask=there[:, None], other=0)
    even, odd = tl.split(tl.reshape(four, [four.shape[0], 2, 2]))
    start, own = tl.split(even)
    end, _ = tl.split(odd)
    return start, end, own


@triton.jit
def number_of_positives(start, end, own):
    """How many keys are positives of each row, as fp32."""
    return (end - start - tl.where((own >= start) & (own < end), 1, 0)).to(tl.float32)


@triton.jit
def hulls(start, end, own, member):
    """Over the member rows: hull and intersection of the positives, hull of the own keys. Empty ones end at 0."""
    filled = member & (start < end)
    # One reduction of all six: each has barriers of its own.
    outer_start, outer_end, inner_start, inner_end, own_start, own_end = tl.reduce(
        (
            tl.where(filled, start, FARTHEST), tl.where(filled, end, 0),
            tl.where(member, start, 0), tl.where(member, end, FARTHEST),
            tl.where(member & (own >= 0), own, FARTHEST), tl.where(member, own + 1, 0),
        ),
        0, joined_hulls,
    )  # fmt: skip
    return outer_start, outer_end, inner_start, inner_end, own_start, own_end


@triton.jit
def joined_hulls(
    outer_start, outer_end, inner_start, inner_end, own_start, own_end,
    other_outer_start, other_outer_end, other_inner_start, other_inner_end, other_own_start, other_own_end,
):  # fmt: skip
    return (
        tl.minimum(outer_start, other_outer_start), tl.maximum(outer_end, other_outer_end),
        tl.maximum(inner_start, other_inner_start), tl.minimum(inner_end, other_inner_end),
        tl.minimum(own_start, other_own_start), tl.maximum(own_end, other_own_end),
    )  # fmt: skip


@triton.jit
def spans(outer_start, outer_end, inner_start, inner_end, start, end, RULE: tl.constexpr):
    """The keys of start:end that a rule can count, as two spans; the second is empty but for a hole in the middle.

    No bound lies behind `end`, even where the positives have none (see `meeting_in_any_order`). Both are empty where no
    row of the block is in the region: then the intersection of the positives is everything.
    """
    end = tl.where(inner_end == FARTHEST, start, end)
    if RULE == "positives":
        end = tl.minimum(outer_end, end)
        start = tl.minimum(tl.maximum(outer_start, start), end)
    hole, rest = end, end
    if RULE == "negatives":
        if inner_start < inner_end:
            hole = tl.minimum(tl.maximum(inner_start, start), end)
            rest = tl.minimum(tl.maximum(inner_end, start), end)
    return start, tl.maximum(hole, start), rest, end


@triton.jit
def is_clean(outer_start, outer_end, inner_start, inner_end, own_start, own_end, first, last, RULE: tl.constexpr):
    """Whether each pair of the block's rows with keys first:last counts (all being in the region)."""
    clean = True
    if RULE != "every":
        clean = (last <= own_start) | (first >= own_end)
    if RULE == "positives":
        clean = clean & (first >= inner_start) & (last <= inner_end)
    if RULE == "negatives":
        clean = clean & ((last <= outer_start) | (first >= outer_end))
    return clean


@triton.jit
def counts(start, end, own, keys, RULE: tl.constexpr):
    """Whether the rule counts each pair of anchors and keys of one region; the intervals are those of the anchors."""
    inside = (keys >= start) & (keys < end)
    if RULE == "positives":
        counted = inside & (keys != own)
    elif RULE == "negatives":
        counted = (~inside) & (keys != own)
    elif RULE == "others":
        counted = keys != own
    else:
        counted = keys == keys
    return counted


@triton.jit
def counts_read(pos_start, pos_end, self_pos, rows, there, keys, RULE: tl.constexpr):
    """`counts` of all pairs of rows and keys, with the rows' intervals read anew.

    Loads in a branch keep it one. Without them the compiler computes both ways for every tile, and selects.
    """
    start, end, own = row_intervals(pos_start, pos_end, self_pos, rows, there)
    return counts(start[:, None], end[:, None], own[:, None], keys[None, :], RULE)


# ------------------------------------------------------------------------------------------------------- memory


@triton.jit
def load_rows(pointer, rows, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [., D] as a tile [., BLOCK_D]; zeros where no row or channel is."""
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
    """The four statistics of each row, read as one 16-byte piece."""
    four = tl.load(pointer + rows.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], mask=there[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(four, [four.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


# --------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def reciprocal(x):
    """1 / x of a positive number, in one special-function operation where a division takes many."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def softplus(x):
    """log2(1 + 2^x) and its derivative, the logistic function of x ln 2; finite for every x, to 3e-7 of themselves.

    log2(1 + e) for e in [0, 1] is e times a minimax polynomial: multiply-adds are idle where exponentials are not.
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


@triton.jit(do_not_specialize=["grad_stride", "num_rows"])
def largest_kernel(grad, grad_stride, empty, largest_grads, num_rows, BLOCK: tl.constexpr):
    """Largest |grad| of each block of rows; of a row that is -inf in `empty` the gradient means nothing."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(empty + rows, mask=rows < num_rows, other=-INF) != -INF
    tl.store(
        largest_grads + tl.program_id(0), tl.max(tl.abs(tl.load(grad + rows * grad_stride, mask=counts, other=0.0)), 0)
    )


@triton.jit
def largest_of(largest_grads, grad_stride, num_rows, BLOCK: tl.constexpr):
    """The largest of what `largest_kernel` left; where all rows have one gradient, of stride 0, that alone."""
    largest = tl.zeros([BLOCK], tl.float32)
    num_blocks = tl.where(grad_stride == 0, 1, tl.cdiv(num_rows, BLOCK))
    for first in range(0, num_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(largest_grads + blocks, mask=blocks < num_blocks, other=0.0)))
    return tl.max(largest, 0)


@triton.jit
def lift_of(largest_grad, bound):
    """Power of two that brings the largest fp16 slope, at most largest_grad * bound, near 8192: small ones survive.

    The two directions of a pair add up, which stays far below the largest fp16 number, 65504.
    """
    largest = largest_grad * bound
    power = tl.exp2(tl.floor(tl.log2(8192.0 / largest)))
    return tl.where((largest > 2.0**-100) & (largest < 2.0**100), power, 1.0)
