"""Planted mistakes in the kernels, the native library and the losses, each of which the tests must notice:
`python -m tests.tools.mutations [words]`.

Every mistake is made in a copy of the package and the tests, where the tests that should see it run: those of Triton's
kernels in its interpreter, those of the CUDA sources on the CPU, those of the C++ sources after a build, those of a
loss, of launches and of compiled kernels as they are. A mistake that survives, and a selection of tests that fails
without one, make the script fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.tools.native_mutations import PLANTED

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("hpcloss/backends/triton")
PROCESSES = 2
LIMIT = 300  # seconds; a kernel that never ends is noticed too


class Mutation(NamedTuple):
    name: str
    file: str  # in the folder of the kernels, in csrc/, or a path from the root
    old: str  # occurs once in the file
    new: str
    tests: str  # expression of `pytest -k`; for a path from the root with the file of the tests: "test_pixel: queue"


ENTROPY = "test_pair_cross_entropy and float32"
LSE = "test_pair_lse and not both and float32"
MEAN = "test_pair_mean and float32"
EDGE = "test_edges and 16x16"
PACK = "test_live_rows_end_anywhere"
LINEAR = "test_linear_mean_of_plans and short"
SORT = "partition_of_several_tiles or (cuda and (two_sorts or intervals or class_sort))"
LABELS = "label_sort_of_several_tiles"
PARTS = "several_parts_on"

MUTATIONS = [
    # ------------------------------------------------------------------------------ cross-entropy
    Mutation(
        "the gap does not rise with the largest similarity", "pair_cross_entropy.py",
        "gap += weights * rise", "gap += 0.0 * rise",
        f"{ENTROPY} and one and region",
    ),
    Mutation(
        "powers not rescaled", "pair_cross_entropy.py",
        "powers * tl.exp2(-rise * rate)", "powers",
        f"{ENTROPY} and one and region",
    ),
    Mutation(
        "a tile whose first keys are positives is far", "pair_cross_entropy.py",
        "if has_positives(hull, first, first + BLOCK_J):", "if has_positives(hull, first, first):",
        f"{ENTROPY} and one and region",
    ),
    Mutation(
        "weights not rescaled", "pair_cross_entropy.py",
        "gap = gap * kept + tl.sum(weight * below, 1)", "gap = gap + tl.sum(weight * below, 1)",
        f"{ENTROPY} and one and region",
    ),
    Mutation(
        "positives of other regions counted", "pair_cross_entropy.py",
        "weights += tl.where(member, number, 0.0)", "weights += number",
        f"{ENTROPY} and self",
    ),
    Mutation(
        "positives of the other direction stay", "pair_cross_entropy.py",
        "weights += weight * anchor.factor_of_positives[None, :]", "weights += 0.0",
        f"{ENTROPY} and self",
    ),
    Mutation(
        "mass of the weights not subtracted", "pair_cross_entropy.py",
        "similarity * (-hardness * LOG2E) - mass)", "similarity * (-hardness * LOG2E))",
        f"{ENTROPY} and self",
    ),
    Mutation(
        "the gradient of the lse is lost", "pair_cross_entropy.py",
        "of_all += tl.load(grad_lse", "of_all += 0.0 * tl.load(grad_lse",
        f"{ENTROPY} and self",
    ),
    Mutation(
        "a negative scale has the smallest similarity for its largest", "pair_cross_entropy.py",
        "tl.where(scale < 0, -1.0, 1.0)", "tl.where(scale < 0, 1.0, 1.0)",
        f"{ENTROPY} and self",
    ),
    Mutation(
        "keys' pass forgets the positives", "backward.py",
        "first, first + BLOCK_J) if ROW else True", "first, first + BLOCK_J) if ROW else False",
        f"{ENTROPY} and labelled",
    ),
    Mutation(
        "the scale's gradient of separate keys halved", "pair_cross_entropy.py",
        "(coefficients.scale * (2 if keys is None else 1))", "(coefficients.scale * 2)",
        f"{ENTROPY} and labelled",
    ),
    Mutation(
        "the other direction of a diagonal tile not transposed", "hpcloss/backends/blockwise/pair_cross_entropy.py",
        ".copy_(slope.T).add_(slope)", ".copy_(slope).add_(slope)",
        "test_backends: test_pair_cross_entropy and sliced and self",
    ),
    Mutation(
        "blockwise: the gap does not rise", "hpcloss/backends/blockwise/pair_cross_entropy.py",
        "gap_i.addcmul_(met_i, rise)", "gap_i.addcmul_(met_i, 0.0 * rise)",
        "test_backends: test_pair_cross_entropy and tiny and self",
    ),
    Mutation(
        "blockwise: far tiles not shifted", "hpcloss/backends/blockwise/pair_cross_entropy.py",
        "of_all * torch.exp2(-shift) if safe else of_all", "of_all",
        "test_backends: test_pair_cross_entropy and tiny and self",
    ),
    Mutation(
        "blockwise: p from a rounded log-sum-exp", "hpcloss/backends/blockwise/pair_cross_entropy.py",
        "return loss, (shift + log_total) * LN2, mass, shift, total",
        "return loss, (lse := (shift + log_total) * LN2), mass, lse / LN2, torch.ones_like(total)",
        "test_near_minimum: SupCon",
    ),
    Mutation(
        "a block against itself twice", "hpcloss/backends/blockwise/tiles.py",
        "if symmetric and not pure and p0 < i1 and p1 > i0:", "if False:",
        "test_backends: test_pair_lse and near",
    ),
    Mutation(
        "a positive left of the tile is overwritten at its end", "hpcloss/backends/blockwise/tiles.py",
        "(column >= 0) & (column < values.shape[1])", "(column < values.shape[1])",
        "test_backends: test_pair_lse and negatives and one",
    ),
    Mutation(
        "one positive: two parts that cancel", "hpcloss/primitives/contrast.py",
        "softplus(lse - own), 0.0)", "torch.logaddexp(lse, own) - own, 0.0)",
        "test_near_minimum: small_losses and ntxent",
    ),
    Mutation(
        "one positive: it stays among the negatives", "hpcloss/backends/dense/one_positive.py",
        "    logits.scatter_(1, place, -INF)\n", "",
        "test_one_positive: test_one_positive and dense and paired",
    ),
    Mutation(
        "one positive: the anchor meets itself among other keys", "hpcloss/backends/dense/one_positive.py",
        "int(at.self_pos[0]) >= 0", "int(at.self_pos[0]) < -1",
        "test_one_positive: test_one_positive and dense and among",
    ),
    Mutation(
        "one positive: keys that do not exist are met", "hpcloss/backends/dense/one_positive.py",
        "key >= at.key_end", "key > at.key_end",
        "test_one_positive: test_one_positive and dense and dead",
    ),
    Mutation(
        "one positive: a factor is left out of the gradient", "hpcloss/backends/dense/one_positive.py",
        "weight = _times(weight, factor).unsqueeze(dim)", "weight = weight.unsqueeze(dim)",
        "test_one_positive: test_one_positive and dense and two",
    ),
    Mutation(
        "one positive: a factor is left out of the gradient without a shift", "hpcloss/backends/dense/one_positive.py",
        "(one * factor).unsqueeze(dim)", "one.unsqueeze(dim)",
        "test_one_positive: test_one_positive and dense and two",
    ),
    Mutation(
        "one positive: the sums of rows stand for those of columns", "hpcloss/backends/dense/one_positive.py",
        "logits.sum(0)", "logits.sum(1)",
        "test_one_positive: test_both_directions and dense",
    ),
    Mutation(
        "one positive: the bound of the largest factor is that of the scale", "hpcloss/backends/dense/one_positive.py",
        "scale_bound * max(factors)", "scale_bound",
        "test_one_positive: test_a_factor_that_overflows",
    ),
    Mutation(
        "one positive: tiles take the logit's gradient for one side", "hpcloss/backends/blockwise/one_positive.py",
        "        if into.numel():\n", "        if others is not None and into.numel():\n",
        "test_one_positive: test_one_positive and sliced and paired",
    ),
    Mutation(
        "several factors: tiles take the first one's weights for all", "hpcloss/backends/blockwise/pair_lse.py",
        "weight = weights[number, rows, None]", "weight = weights[0, rows, None]",
        "test_one_positive: test_one_positive and sliced and paired",
    ),
    Mutation(
        "several factors: the last multiple is a multiple of the first", "hpcloss/backends/blockwise/pair_lse.py",
        'torch.mul(logits, factor, out=tiles.buffer("multiple", tile))', "logits.mul_(factor)",
        "test_one_positive: test_one_positive and sliced and paired",
    ),
    Mutation(
        "two by two: each row is its own partner", "hpcloss/plan/partition.py",
        "partner = rows ^ 1", "partner = rows ^ 0",
        "test_one_positive: two_by_two",
    ),
    Mutation(
        "hard negatives: what is left of none is as much as before", "hpcloss/losses/vectors.py",
        "ratio = torch.maximum(left - math.log1p(-tau_plus), -scale.value - positive)",
        "ratio = left - math.log1p(-tau_plus)",
        "test_vectors: hard_negative",
    ),
    Mutation(
        "the single row's sums of columns overwrite its logits", "hpcloss/backends/dense/pair_lse.py",
        "logits.mT.clone(memory_format=torch.contiguous_format)", "logits.mT.contiguous()",
        "test_backends: test_pair_lse_both_of_one_row",
    ),
    Mutation(
        "the assignment is not subtracted", "hpcloss/losses/prototype.py",
        "weight.sum(1, keepdim=True) - weight", "weight.sum(1, keepdim=True)",
        "test_near_minimum: assignment",
    ),
    # ------------------------------------------------------------------------------ the trial of the kernels
    Mutation(
        "NaN passes for rounding", "hpcloss/backends/triton/trial.py",
        "if not error <= tolerance:", "if error > tolerance:",
        "test_trial: wrong_numbers",
    ),
    Mutation(
        "exact products may be as wrong as those of half precision", "hpcloss/backends/triton/trial.py",
        "TOLERANCE[configs.precision(step.rows)]", 'TOLERANCE["half"]',
        "test_trial: held_to_more",
    ),
    Mutation(
        "no gradient is tried", "hpcloss/backends/triton/trial.py",
        "zip(Step._fields, step, exact)", "zip(Step._fields[:2], step, exact)",
        "test_ptx: finds_wrong_kernels",
    ),
    Mutation(
        "short memory is remembered", "hpcloss/backends/triton/trial.py",
        "return not passes and not any", "return not any",
        "test_trial: short_memory",
    ),
    Mutation(
        "what another thread's capture forbids is remembered", "hpcloss/backends/triton/trial.py",
        '("out of memory", "captur")', '("out of memory",)',
        "test_trial: capture_elsewhere",
    ),
    Mutation(
        "the trial runs in the caller's thread", "hpcloss/backends/triton/trial.py",
        "    thread.start()\n    thread.join()\n", "    thread.run()\n",
        "test_trial: under_modes",
    ),
    Mutation(
        "the trial draws from the training's generator", "hpcloss/backends/triton/trial.py",
        "PIXELS, generator=generator, dtype", "PIXELS, dtype",
        "test_trial: right_numbers",
    ),
    Mutation(
        "kernels are tried during capture", "hpcloss/backends/__init__.py",
        'elif device == "cuda" and torch.cuda.is_current_stream_capturing():', "elif False:",
        "test_trial: during_capture",
    ),
    Mutation(
        "what is said during capture is remembered", "hpcloss/backends/__init__.py",
        '_CAPTURING if falls_back else "", False', '_CAPTURING if falls_back else "", True',
        "test_trial: during_capture",
    ),
    Mutation(
        "threads try at once", "hpcloss/backends/__init__.py",
        "with _trying:  # a second", "if True:  # a second",
        "test_trial: threads",
    ),
    Mutation(
        "a failure is told at each call", "hpcloss/backends/__init__.py",
        "        _told.add(key)\n", "",
        "test_trial: errors",
    ),
    Mutation(
        "a failure of one device is that of all", "hpcloss/backends/__init__.py",
        "    key = device, index, dtype\n", "    key = device, 0, dtype\n",
        "test_trial: two_devices",
    ),
    Mutation(
        "an architecture is said to have been executed", "hpcloss/backends/evidence.py",
        "(80, 90, 120),  # whole", "(80, 89, 90, 120),  # whole",
        "test_evidence: test_tests",
    ),
    Mutation("rows are cut to tf32", "rows.py", "(bits + 0x1000)", "bits", "rows_of_tf32"),
    Mutation("NaN is rounded to a number", "rows.py", "tl.where(x == x, near, x)", "near", "rows_of_tf32"),
    Mutation("all fp32 rows are rounded to tf32", "rows.py", "    if TF32:", "    if D > 0:", "exact_products"),
    Mutation(
        "a learnable temperature cannot be set", "hpcloss/losses/vectors.py",
        "self.log_scale.fill_(-math.log(float(value)))", "pass",
        "test_modules: learnable_temperature",
    ),
    # ------------------------------------------------------------------------------ launches
    Mutation(
        "a global that differs from itself", "hpcloss/backends/triton/rows.py",
        'INF = tl.constexpr(float("inf"))', 'INF = tl.constexpr(float("nan"))',
        "test_offline: launched_and_again",
    ),
    Mutation(
        "a loss launches a global that differs from itself", "hpcloss/backends/triton/rows.py",
        'INF = tl.constexpr(float("inf"))', 'INF = tl.constexpr(float("nan"))',
        "test_launch_path: float16-ntxent",
    ),
    Mutation(
        "an argument is missing", "hpcloss/backends/triton/linear_mean.py",
        "mass, slope,\n        anchors.shape[0], at.own_start.numel(), BLOCK_I",
        "mass, slope,\n        anchors.shape[0], BLOCK_I",
        "test_launch_path: float16-ntxent",
    ),
    Mutation(
        "a constant has no hash", "hpcloss/backends/triton/rows.py",
        '"TOGETHER": together', '"TOGETHER": {together}',
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "a number is given for a pointer", "hpcloss/backends/triton/linear_mean.py",
        "sums, at, scale, out, mass, slope,", "sums, at, float(scale), out, mass, slope,",
        "test_launch_path: float16-ntxent",
    ),
    Mutation(
        "an option is misspelt", "hpcloss/backends/triton/segment_mean.py",
        "**sizes | constants, num_warps=4)", "**sizes | constants, num_warp=4)",
        "test_launch_path: float16-ntxent",
    ),
    Mutation(
        "the grid is a number", "hpcloss/backends/triton/launch.py",
        "kernel[(programs,)]", "kernel[programs]",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "the number of programs is a fraction", "hpcloss/backends/triton/rows.py",
        "launch.run(kernel, configs.blocks_of(count, block)", "launch.run(kernel, count / block",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "a single program is not launched", "hpcloss/backends/triton/launch.py",
        "if programs == 0:", "if programs < 2:",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "a program has 2,048 threads", "hpcloss/backends/triton/rows.py",
        "TILE, NUM_WARPS = 8192, 8", "TILE, NUM_WARPS = 8192, 64",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "tiles fill more shared memory than there is", "hpcloss/backends/triton/configs.py",
        "shapes[kernel][WIDTHS.index(width)]", "shapes[kernel][WIDTHS.index(width)]._replace(num_stages=40)",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "numbers of rows are specialised", "hpcloss/backends/triton/rows.py",
        '*PLACES, "num_rows"])  # live', "*PLACES])  # live",
        "test_launch_path: float16-supcon",
    ),
    Mutation(
        "strides of a map are specialised", "hpcloss/backends/triton/rows.py",
        '"channel_stride", *PLACES, "num_rows"', '"channel_stride", "num_rows"',
        "test_launch_path: float16-region",
    ),
    Mutation(
        "the number of live rows is specialised on where it lies", "hpcloss/backends/triton/rows.py",
        '(do_not_specialize=["live", *PLACES', "(do_not_specialize=[*PLACES",
        "test_launch_path: float16-region and batch",
    ),
    Mutation(
        "some numbers of rows leave vectors unaligned", "hpcloss/backends/triton/linear_mean.py",
        "(torch.empty(anchors.shape[0], dtype=torch.float32, device=anchors.device) for _ in range(3))",
        "torch.empty(3, anchors.shape[0], dtype=torch.float32, device=anchors.device)",
        "test_launch_path: float16-ntxent",
    ),
    Mutation(
        "a loop starts at the largest number", "tiles.py",
        "start = tl.minimum(tl.maximum(hull.outer_start, start), end)", "start = tl.maximum(hull.outer_start, start)",
        "test_spans_are_keys_of_the_region",
    ),
    Mutation(
        "a loop over no regions starts at the largest number", "tiles.py",
        "return tl.minimum(low, high), high", "return low, high",
        "test_intervals_in_any_order",
    ),
    Mutation(
        "a loop that loads ahead starts at the largest number", "hpcloss/backends/triton/tiles.py",
        "start = tl.minimum(tl.maximum(hull.outer_start, start), end)", "start = tl.maximum(hull.outer_start, start)",
        "test_ptx: blocks_that_have_none",
    ),
    Mutation(
        "a tile's last columns are loaded without a mask", "hpcloss/backends/triton/pair_lse.py",
        "y = load_rows(keys, columns, columns < last, D, BLOCK_D)",
        "y = load_rows(keys, columns, columns >= 0, D, BLOCK_D)",
        "test_ptx: 80-float16-infonce",
    ),
    # ------------------------------------------------------------------------------ which pairs count
    Mutation(
        "the keys behind a hole start after the last one", "tiles.py",
        "rest = tl.minimum(tl.maximum(hull.inner_end, start), end)",
        "rest = tl.minimum(tl.maximum(hull.inner_end, start), end - 1)",
        "test_spans_are_keys_of_the_region",
    ),
    Mutation(
        "interval starts one late", "tiles.py",
        "inside = (keys >= start) & (keys < end)", "inside = (keys > start) & (keys < end)",
        f"{LSE} and cells and positives",
    ),
    Mutation(
        "interval ends one late", "tiles.py",
        "inside = (keys >= start) & (keys < end)", "inside = (keys >= start) & (keys <= end)",
        f"{LSE} and cells and positives",
    ),
    Mutation(
        "self is a positive", "tiles.py",
        "counted = inside & (keys != self_key)", "counted = inside",
        f"{LSE} and background and positives",
    ),
    Mutation(
        "self is among the others", "tiles.py",
        "counted = keys != self_key", "counted = keys == keys",
        f"{LSE} and background and others",
    ),
    Mutation(
        "a hole where classes differ", "tiles.py",
        "if hull.inner_start < hull.inner_end:", "if hull.outer_start < hull.outer_end:",
        f"{LSE} and short and negatives",
    ),
    Mutation(
        "hole one too wide", "tiles.py",
        "hole = tl.minimum(tl.maximum(hull.inner_start, start), end)",
        "hole = tl.minimum(tl.maximum(hull.inner_start - 1, start), end)",
        f"{LSE} and short and negatives",
    ),
    Mutation(
        "clean by the hull of the positives", "tiles.py",
        "(first >= hull.inner_start) & (last <= hull.inner_end)",
        "(first >= hull.outer_start) & (last <= hull.outer_end)",
        f"{EDGE} and runs",
    ),
    Mutation(
        "clean although self is there", "tiles.py",
        "clean = (last <= hull.self_start) | (first >= hull.self_end)", "clean = True",
        f"{EDGE} and whole",
    ),
    Mutation(
        "clean by the last row's positives", "tiles.py",
        "tl.minimum(inner_end, other_inner_end)", "tl.minimum(tl.maximum(inner_end, other_inner_end), FARTHEST - 1)",
        f"{EDGE} and runs",
    ),
    Mutation(
        "rows of no region visit keys", "tiles.py",
        "end = tl.where(hull.inner_end == FARTHEST, start, end)", "end = end",
        "test_spans_are_keys_of_the_region and others",
    ),
    Mutation(
        "region that ends on a block's first row", "tiles.py",
        "low += tl.sum((end <= first)", "low += tl.sum((end <= first + 1)",
        f"{EDGE} and regions and not without",
    ),
    Mutation(
        "region that starts on a block's last row", "tiles.py",
        "high += tl.sum((start < last)", "high += tl.sum((start < last - 1)",
        f"{EDGE} and regions and not without",
    ),
    Mutation(
        "a search of many regions in one trip", "tiles.py",
        "if count > 2**8:", "if count > 2**8 + 1:",
        "test_ascending_intervals and 257",
    ),
    Mutation(
        "a search that looks at the first of each piece", "tiles.py",
        "tl.arange(0, SCAN) * step + (step - 1)", "tl.arange(0, SCAN) * step",
        "test_ascending_intervals and 513",
    ),
    Mutation(
        "keys of regions in no order miss the last", "tiles.py",
        "tl.max(tl.where(meets, number + 1, 0))", "tl.max(tl.where(meets, number, 0))",
        "test_intervals_in_any_order",
    ),
    Mutation(
        "keys whose regions are in no order are searched", "pair_lse.py",
        "if key_start.numel() > 1:", "if key_start.numel() < 1:",
        "test_pair_lse_both and any and float32",
    ),
    Mutation(
        "NaN among weighted positives is a loss of 0", "pair_cross_entropy.py",
        "filled = weights != 0", "filled = weights > 0",
        "test_nan_among_positives",
    ),
    Mutation(
        "the own key of another anchor", "tiles.py",
        "tl.where(which == 1, intervals.pos_end, intervals.self_pos)",
        "tl.where(which == 1, intervals.pos_end, intervals.pos_end)",
        f"{LSE} and labelled and others",
    ),
    Mutation(
        "keys past the region counted", "pair_lse.py",
        "& whole & (first + BLOCK_J <= last)):", "& whole):",
        f"{LSE} and class and every",
    ),
    Mutation(
        "rows of other regions counted", "pair_lse.py",
        "exponent = tl.where(counted & member[:, None] & (columns < last)[None, :], exponent, -INF)",
        "exponent = tl.where(counted & (columns < last)[None, :], exponent, -INF)",
        f"{LSE} and background and every",
    ),
    Mutation(
        "tail columns not masked", "pair_lse.py",
        "exponent = tl.where(counted & member[:, None] & (columns < last)[None, :], exponent, -INF)",
        "exponent = tl.where(counted & member[:, None], exponent, -INF)",
        f"{LSE} and background and every",
    ),
    Mutation(
        "gradients of rows of other regions", "backward.py",
        "RULE) & member[:, None] & inside[None, :]", "RULE) & inside[None, :]",
        f"{LSE} and many and every",
    ),
    Mutation(
        "one anchor short where keys alone meet anchors", "backward.py",
        "tl.maximum(begin, first_anchor), tl.minimum(hole, last_anchor)",
        "tl.maximum(begin, first_anchor), tl.minimum(hole, last_anchor - 1)",
        f"{EDGE} and both",
    ),
    Mutation(
        "a block with one anchor taken for keys alone", "backward.py",
        "(first_row + BLOCK_I <= first_anchor)", "(first_row + BLOCK_I <= first_anchor + 1)",
        f"{EDGE} and less",
    ),
    Mutation(
        "keys miss the last anchor they meet", "backward.py",
        "begin, stop = begin + low, begin + high", "begin, stop = begin + low, begin + high - 1",
        f"{LSE} and labelled and positives",
    ),
    # ----------------------------------------------------------------------------------------- values
    Mutation(
        "running sum not rescaled", "pair_lse.py",
        "total = total * tl.exp2(largest - base) + ", "total = total + ",
        f"{LSE} and one and region and every",
    ),
    Mutation(
        "rows of empty sets not written", "pair_lse.py",
        "tl.store(lse + rows, total_log * LN2, mask=there)",
        "tl.store(lse + rows, total_log * LN2, mask=there & (total > 0))",
        f"{LSE} and background and positives",
    ),
    Mutation(
        "running mean not rescaled", "pair_mean.py",
        "weights * kept, terms * kept, shares * kept", "weights * kept, terms, shares * kept",
        f"{MEAN} and one and region",
    ),
    Mutation(
        "self among the number of positives", "tiles.py",
        "(end - start - tl.where((self_key >= start) & (self_key < end), 1, 0)).to(tl.float32)",
        "(end - start).to(tl.float32)",
        f"{MEAN} and one and region",
    ),
    Mutation(
        "discount of the wrong sign", "pair_mean.py",
        "term -= (discount * LOG2E) * similarity", "term += (discount * LOG2E) * similarity",
        f"{MEAN} and background",
    ),
    Mutation(
        "slope of stat not a mean", "pair_mean.py",
        "tl.store(results.slope + rows, shares / divisor, mask=there)",
        "tl.store(results.slope + rows, shares, mask=there)",
        f"{MEAN} and background",
    ),
    Mutation(
        "logistic function mirrored", "tiles.py",
        "tl.where(x < 0, small, 1.0)", "tl.where(x > 0, small, 1.0)",
        f"{MEAN} and background",
    ),
    # -------------------------------------------------------------------------------------- gradients
    Mutation(
        "gradient of the wrong sign", "pair_lse.py",
        "slopes += weight * anchor.factor[:, None]", "slopes -= weight * anchor.factor[:, None]",
        f"{LSE} and background and every",
    ),
    Mutation(
        "the other direction dropped", "backward.py",
        "of_other = load_statistics(statistics.other, columns, inside) if COL else None", "of_other = None",
        f"{LSE} and background and every",
    ),
    Mutation(
        "lse not subtracted where nothing overflows", "pair_lse.py",
        "grad_i *= tl.exp2(-shift)", "grad_i *= 1.0",
        f"{LSE} and background and every",
    ),
    Mutation(
        "bias of the wrong side", "pair_lse.py",
        "weight = directed(exponent, other_bias, anchor.shift[:, None], ONLINE)",
        "weight = directed(exponent, own_bias, anchor.shift[:, None], ONLINE)",
        f"{LSE} and background",
    ),
    Mutation(
        "d scale times the scale", "pair_lse.py",
        "by_scale = weight * (anchor.scale_factor[:, None] * similarity)",
        "by_scale = weight * (anchor.factor[:, None] * similarity)",
        f"{LSE} and background and every",
    ),
    Mutation(
        "d scale of both directions", "pair_lse.py",
        "slopes += directed(exponent, own_bias, anchor.shift[None, :], ONLINE) * anchor.factor[None, :]",
        "part = directed(exponent, own_bias, anchor.shift[None, :], ONLINE) * anchor.factor[None, :]\n"
        "        slopes += part\n        by_scale += part * similarity",
        f"{LSE} and background and every",
    ),
    Mutation(
        "d scale of pairs that do not count", "backward.py",
        "along_scale = tl.where(count, along_scale, 0.0)", "along_scale = along_scale",
        f"{LSE} and background and negatives",
    ),
    Mutation(
        "mass not subtracted", "pair_mean.py",
        "exponent -= mass", "exponent -= 0.0",
        f"{MEAN} and background",
    ),
    Mutation(
        "weights pull the wrong way", "pair_mean.py",
        "by_similarity += coefficients.pull * (term - out)", "by_similarity -= coefficients.pull * (term - out)",
        f"{MEAN} and background",
    ),
    Mutation(
        "discount of the wrong sign in the bounded slope", "pair_mean.py",
        "slopes -= coefficients.discount * always", "slopes += coefficients.discount * always",
        f"{MEAN} and background",
    ),
    Mutation(
        "the other direction dropped from the bounded slope", "pair_mean.py",
        "part = part * other_whole + anchor.numerator[None, :] * whole", "part = part * other_whole",
        f"{MEAN} and background",
    ),
    Mutation(
        "lift not undone", "backward.py",
        "store_rows(gradients.rows, rows, there, total * unlift, D, BLOCK_D)",
        "store_rows(gradients.rows, rows, there, total, D, BLOCK_D)",
        "test_gradients_at_the_weights and online",
    ),
    Mutation(
        "no lift of small gradients", "backward.py",
        "tl.where((largest > 2.0**-100) & (largest < 2.0**100), power, 1.0)",
        "tl.where((largest > 2.0**100) & (largest < 2.0**100), power, 1.0)",
        "test_gradients_at_the_weights and online",
    ),
    Mutation(
        "the largest of many gradients is the first", "backward.py",
        "if grad_lse is None and grad.stride(0) == 0:", "if grad_lse is None:", "the_largest_gradient",
    ),
    Mutation(
        "one gradient is read as many", "backward.py",
        "tl.where(grad_stride == 0, 1, tl.cdiv(num_rows, BLOCK))", "tl.cdiv(num_rows, BLOCK)", "the_largest_gradient",
    ),
    Mutation(
        "a gradient with a second one is searched with the stride of the first", "backward.py",
        "bound = grad = grad.contiguous()", "bound = grad", "the_largest_gradient",
    ),
    # --------------------------------------------------------------------------------------- launches
    Mutation(
        "statistics of the wrong side for the keys", "pair_lse.py",
        "(keys, anchors, of_keys, of_anchors, _exchanged", "(keys, anchors, of_anchors, of_keys, _exchanged",
        "test_pair_lse_both and float32 and one",
    ),
    Mutation(
        "regions not exchanged", "pair_lse.py",
        "return [*positives, key_start, key_end, anchor_start, anchor_end]",
        "return [*positives, anchor_start, anchor_end, key_start, key_end]",
        "test_pair_lse_both and float32 and labelled",
    ),
    Mutation(
        "weights differentiated although detached", "pair_mean.py",
        "pull = None if detach_weights or hardness == 0 else -hardness", "pull = None if hardness == 0 else -hardness",
        f"{MEAN} and background",
    ),
    # --------------------------------------------------------------------------------- pack, segments
    Mutation(
        "norm's part of the gradient added", "rows.py",
        "g -= unit * tl.expand_dims(tl.sum(g * unit, C), C)", "g += unit * tl.expand_dims(tl.sum(g * unit, C), C)",
        PACK,
    ),
    Mutation("dead rows packed", "rows.py", "alive = there & (rows < tl.load(live))", "alive = there", PACK),
    Mutation("gradient of dead pixels not written", "rows.py", "written = there", "written = alive", PACK),
    Mutation(
        "self in the sum of the class", "linear_mean.py",
        "others = shared[None, :] - tl.where(inside[:, None], x, 0.0)", "others = shared[None, :]",
        LINEAR,
    ),
    Mutation(
        "self once in the gradient of the class sum", "linear_mean.py",
        "total -= 2 * weight[:, None] * itself", "total -= weight[:, None] * itself",
        LINEAR,
    ),
    Mutation(
        "self among few positives", "linear_mean.py",
        "counted = short & (key < end) & (key != self_key)", "counted = short & (key < end)",
        LINEAR,
    ),
    # ------------------------------------------------------------------------------ partition on CUDA
    Mutation(
        "counters are raised while they are read", "partition.cu",
        "__syncwarp();\n    if (exists && before == 0)", "if (exists && before == 0)", SORT,
    ),
    Mutation(
        "not stable inside a warp", "partition.cu",
        "__popc(peers & ((1u << lane) - 1))", "__popc(peers & ~((2u << lane) - 1))", SORT,
    ),
    Mutation("only the warp before counts", "partition.cu", "before += count;", "before = count;", SORT),
    Mutation(
        "the digits' first rows are not waited for", "partition.cu",
        "place[i] = 0;\n  __syncthreads();", "place[i] = 0;", SORT,
    ),
    Mutation(
        "the background keeps its rank", "partition.cu",
        "number == behind ? 0 : number + (number < behind)", "number", SORT,
    ),
    Mutation(
        "ignored labels count as strays", "partition.cu",
        "*stray = !is_class && !ignored;", "*stray = !is_class;", SORT,
    ),
    Mutation(
        "passes land in the wrong array", "partition.cu",
        "(passes - 1 - i) % 2 ? other : order", "i % 2 ? other : order", "many_segments",
    ),
    Mutation(
        "the second digit starts a bit late", "partition.cu",
        "pass.shift = i * kDigitBits;", "pass.shift = i * (kDigitBits + 1);", "many_segments",
    ),
    Mutation(
        "cells of images are mixed", "pixels.h",
        "static_cast<int64_t>(rest) * cells + region", "static_cast<int64_t>(rest) + region", "cuda and a_grid_is",
    ),
    Mutation(
        "self is counted", "partition.cu",
        "same = end - start - (self >= start && self < end);", "same = end - start;", "cuda and counts_anchors",
    ),
    Mutation(
        "dead rows get bounds", "partition.cu",
        "const bool inside = bound > 0 && bound < count;", "const bool inside = bound > 0;", SORT,
    ),
    # ------------------------------------------------------------------------------ labels without num_classes on CUDA
    Mutation(
        "pixels of a class in any order", "label_sort.cu",
        "return a.pixel < b.pixel;", "return a.pixel > b.pixel;", LABELS,
    ),
    Mutation(
        "labels compared without their sign", "label_sort.cu",
        "return a.label < b.label;", "return static_cast<uint64_t>(a.label) < static_cast<uint64_t>(b.label);", LABELS,
    ),
    Mutation(
        "the background behind other labels", "label_sort.cu",
        "!has_background || label != background", "!has_background || label == background", LABELS,
    ),
    Mutation(
        "without a background label 0 is one", "label_sort.cu",
        "const bool behind = !has_background ||", "const bool behind =", "cuda and four_pixels",
    ),
    Mutation(
        "ignored pixels stay", "label_sort.cu",
        "if (region < 0 || is_ignored(label))", "if (region < 0)", LABELS,
    ),
    Mutation(
        "ignored pixels sorted by their label", "label_sort.cu",
        "return {0, static_cast<Index>(pixel), static_cast<uint32_t>(2 * num_regions)};",
        "return {label, static_cast<Index>(pixel), static_cast<uint32_t>(2 * num_regions)};", "cuda and none_left",
    ),
    Mutation(
        "the last run is as long as the others", "label_sort.cu",
        "left - size < width ? left - size : width;", "width;", LABELS,
    ),
    Mutation(
        "the search for shares stops one short", "label_sort.cu",
        "low = count > other_size ? count - other_size : 0", "low = count > other_size ? count - other_size + 1 : 0",
        LABELS,
    ),
    Mutation(
        "a merged tile begins where its pair does", "label_sort.cu",
        "begin - pair + (thread % 2 ? count : 0)", "(thread % 2 ? count : 0)", LABELS,
    ),
    Mutation(
        "rows are kept while others still write theirs", "label_sort.cu",
        "shared[place + e] = own[e];\n    __syncthreads();", "shared[place + e] = own[e];", LABELS,
    ),
    Mutation(
        "rows are written while others still merge", "label_sort.cu",
        "    __syncthreads();\n    for (int e = 0; e < kEach; ++e) shared[place + e]",
        "    for (int e = 0; e < kEach; ++e) shared[place + e]", LABELS,
    ),
    Mutation(
        "a pass of neighbours is left out", "label_sort.cu",
        "round < kEach; round += 2", "round + 2 < kEach; round += 2", LABELS,
    ),
    Mutation(
        "runs of blocks end in the other array", "label_sort.cu",
        "for (int merged = 1; merged < tiles; merged *= 2) change_places();", "", "cuda and first_kernel",
    ),
    Mutation(
        "tiles of a block are not waited for", "label_sort.cu",
        "width *= 2) {\n    __syncthreads();\n    for (int64_t tile", "width *= 2) {\n    for (int64_t tile",
        "cuda and first_kernel",
    ),
    Mutation(
        "classes begin one row late", "label_sort.cu",
        "reach <= i ? i - reach + 1 : 0", "reach <= i ? i - reach + 2 : 0", LABELS,
    ),
    Mutation(
        "the first row has no class before it", "label_sort.cu",
        "while (reach <= i && same_class", "while (reach < i && same_class", LABELS,
    ),
    Mutation(
        "the last class ends one row early", "label_sort.cu",
        "high = i + reach < n ? i + reach : n;", "high = i + reach < n ? i + reach : n - 1;", LABELS,
    ),
    Mutation(
        "dead rows have positives", "label_sort.cu",
        "to.pos_end[i] = alive ?", "to.pos_end[i] = alive || true ?", LABELS,
    ),
    Mutation(
        "the background is an anchor", "label_sort.cu",
        "part_start(rows, n, 2 * i + 1)", "part_start(rows, n, 2 * i)", LABELS,
    ),
    Mutation(
        "an anchor needs no negative", "partition.cu",
        "&& (!need_negatives || counts.negatives > 0)", "", "cuda and counts_anchors",
    ),
    # ------------------------------------------------------------------------------ samples on CUDA
    Mutation(
        "the count is raised while it is read", "sample.cu",
        "const int count = *buffer.count;\n    __syncthreads();", "const int count = *buffer.count;", PARTS,
    ),
    Mutation(
        "a cut leaves one too few", "sample.cu",
        "*buffer.count = first + keep;", "*buffer.count = first + keep - 1;", PARTS,
    ),
    Mutation(
        "the limit is too low", "sample.cu",
        "buffer.entries[first + keep - 1];", "buffer.entries[first + keep / 2];", PARTS,
    ),
    Mutation(
        "a part reaches into the interval before", "sample.cu",
        "first > begin ? first : begin", "first", PARTS,
    ),
    Mutation(
        "a part ends one early", "sample.cu",
        "limit = first + size, to", "limit = first + size - 1, to", PARTS,
    ),
    Mutation(
        "joining stops at once", "sample.cu",
        "more = __syncthreads_or(any) && more;", "more = __syncthreads_or(any) && false;", f"{PARTS} and 4096",
    ),
    Mutation(
        "the mirror step compares neighbours", "sample.cu",
        "stride == size / 2 ? group + 2 * stride - 1 - offset : low + stride", "low + stride", PARTS,
    ),
    Mutation(
        "hard ones are never more than half", "sample.cu",
        "k - easy > k / 2 ? k - easy : k / 2", "k / 2", "cuda and hard_easy_matches",
    ),
    Mutation(
        "easy ones fill nothing", "sample.cu",
        "take_easy = easy < k - take_hard ? easy : k - take_hard;", "take_easy = easy < k / 2 ? easy : k / 2;",
        "cuda and hard_easy_matches",
    ),
    Mutation(
        "weightless elements are present", "sample.cu",
        "if (!(weight > 0)) return false;", "if (!(weight >= 0)) return false;", "cuda and unusable_weights",
    ),
    Mutation(
        "a positive is drawn twice", "sample.cu",
        "taken[draw] = static_cast<Index>(last);", "taken[draw] = t;", "cuda and positives_match",
    ),
    Mutation(
        "an anchor is its own positive", "sample.cu",
        "has_self && row >= own ? row + 1 : row", "has_self && row > own ? row + 1 : row", "cuda and positives_match",
    ),
    # ------------------------------------------------------------------------------ both, and C++
    Mutation("nine rounds", "philox.h", "round < 10", "round < 9", "cuda and sample_matches"),
    Mutation(
        "the race is given up too early", "philox.h",
        "1.4426f", "1.6f", "(several_parts_on and weighted) or (native and matches_definition_at_size)",
    ),
    Mutation(
        "NaN scores come first", "philox.h",
        "score != score ? 0xFFFFFFFFu", "score != score ? 0u", "native and hardest_first_by_hand",
    ),
    Mutation(
        "a low guess is believed", "sample.cpp",
        "std::min(k_, size) && limit < kNoLimit", "std::min(k_, size) && limit > kNoLimit", "guess",
    ),
    Mutation(
        "an interval is joined before its last part", "sample.cpp",
        "if (--pool->missing == 0)", "if (--pool->missing == 1)", "cut_into_parts",
    ),
    Mutation(
        "pixels of a chunk's end are forgotten", "partition.cpp",
        "for (; i < size; ++i) body(chunk + i, 1, segment[i]);", "", "test_partitions",
    ),
    Mutation(
        "columns of cells are one region", "regions.h",
        "body(pixel, to, base + column);", "body(pixel, to, base);", "native and a_grid_is",
    ),
    Mutation(
        "threads do not know what came before them", "partition.cpp",
        "count[static_cast<size_t>(s)] = first;", "count[static_cast<size_t>(s)] = offsets[s];", "int64_indices",
    ),
    # ------------------------------------------------------------------------------ labels without num_classes in C++
    Mutation(
        "small labels are all there are", "label_sort.cpp",
        "if (bits >= 0 && bits < kSmallLabels)", "if (bits < kSmallLabels)", "native and test_partitions",
    ),
    Mutation(
        "digits: ignored labels stay", "label_sort.cpp",
        "region >= 0 && std::find(ignore, past, label) == past", "region >= 0", "native and many_distinct",
    ),
    Mutation(
        "the last label has no segment", "label_sort.cpp",
        "static_cast<int64_t>(width) + 1;", "std::max<int64_t>(static_cast<int64_t>(width), 1);", "test_partitions",
    ),
    Mutation(
        "the highest digit is left out", "label_sort.cpp",
        "shift < 64 && highest >> shift", "shift < 56 && highest >> shift", "native and any_integer",
    ),
    Mutation(
        "digits count themselves", "label_sort.cpp",
        "++next[digit(row) + 1]", "++next[digit(row)]", "native and any_integer",
    ),
    Mutation(
        "regions first, labels last", "label_sort.cpp",
        "return uint64_t{row.part}; });", "return row.label; });", "native and many_distinct",
    ),
    Mutation(
        "neighbours of two regions are one class", "label_sort.cpp",
        "next.part != own.part || next.label != own.label", "next.label != own.label", "native and four_pixels",
    ),
    Mutation(
        "digits: dead rows have positives", "label_sort.cpp",
        "static_cast<Index>(own.part == dead ? 0 : end)", "static_cast<Index>(end)", "native and many_distinct",
    ),
    Mutation(
        "counted without a positive", "partition.cpp",
        "counted[row] = same > 0 &&", "counted[row] = same >= 0 &&", "native and counts_anchors",
    ),
    # ------------------------------------------------------------------------------ plans in PyTorch, launches
    Mutation(
        "segments end one row early", "hpcloss/plan/sorting.py",
        "return first[segment], first[segment + 1]", "return first[segment], first[segment + 1] - 1",
        "test_partition: torch and segment_bounds",
    ),
    Mutation(
        "labels are sorted by torch although the library is there", "hpcloss/plan/sorting.py",
        "    if _is_countable(labels, 2 * num_regions, ignore_index):", "    if False:",
        "test_launches: test_a_step and 256",
    ),
    Mutation(
        "the companion of rows is filled", "hpcloss/primitives/rows.py",
        "inverse_norm.new_empty_strided(data.shape, (0, 0))", "inverse_norm.new_zeros(()).expand(data.shape)",
        "test_launches: SupCon and 512",
    ),
    Mutation(
        "the gradient of a mean is searched for its largest", "hpcloss/backends/triton/backward.py",
        "if grad_lse is None and grad.stride(0) == 0:", "if False:", "test_launches: SupCon and 512",
    ),
    Mutation(
        "each class counts the anchors of all", "hpcloss/losses/reduction.py",
        "members = seen[end] - seen[start]", "members = seen[end]",
        "test_region_phpc: test_region_supcon_loss and class",
    ),
    # ------------------------------------------------------------------------------ losses
    Mutation(
        "the one positive is the anchor itself", "hpcloss/backends/blockwise/linear_mean.py",
        "start + (at.self_pos[i] == start)", "start",
        "test_pair_mean: test_pair_mean and logit and two",
    ),
    Mutation(
        "the own key stays in the sum of a class among other keys", "hpcloss/backends/blockwise/linear_mean.py",
        "for i in at.self_is_positive().nonzero()[:, 0].split(ROWS):", "for i in ():",
        "test_pair_mean: test_pair_mean and logit and gathered",
    ),
    Mutation(
        "a class's keys get the gradient of its first anchor alone", "hpcloss/backends/blockwise/linear_mean.py",
        "torch.mv(anchors[i0:i1].T, per_pair[i0:i1])", "anchors[i0] * per_pair[i0]",
        "test_pair_mean: test_pair_mean and logit and gathered",
    ),
    Mutation(
        "the queue replaces the batch in the denominator", "hpcloss/losses/pixel.py",
        "lse = merge(lse, pair_lse(", "lse = merge(torch.full_like(lse, -torch.inf), pair_lse(",
        "test_pixel: queue and not training",
    ),
    Mutation(
        "batch and queue swap their shares", "hpcloss/losses/pixel.py",
        "(1 - share) * loss + share * mean_of_old", "share * loss + (1 - share) * mean_of_old",
        "test_pixel: queue and not training",
    ),
    Mutation(
        "positives of the queue do not make an anchor", "hpcloss/losses/pixel.py",
        "positives, negatives = positives + bank.positives, negatives + bank.negatives", "pass",
        "test_pixel: queue and not training",
    ),
    Mutation(
        "right predictions are the hard ones", "hpcloss/losses/pixel.py",
        '"predictions") != labels', '"predictions") == labels',
        "test_pixel: half_of_them_hard",
    ),
    Mutation(
        "of too many embeddings the first remain", "hpcloss/memory.py",
        "place >= (arrived - self.size)[classes]", "place < self.size",
        "test_memory: not compile",
    ),
    Mutation(
        "the queue does not wrap around", "hpcloss/memory.py",
        "self.next.copy_((self.next + arrived) % self.size)",
        "self.next.copy_((self.next + arrived).clamp(max=self.size - 1))",
        "test_memory: not compile",
    ),
    Mutation(
        "empty slots are keys", "hpcloss/memory.py",
        "0.0, -torch.inf).reshape(-1)", "0.0, 0.0).reshape(-1)",
        "test_pixel: queue and not training",
    ),
    Mutation(
        "background is an anchor", "hpcloss/losses/local.py",
        "away = ignored if background is None else (*ignored, background)", "away = ignored",
        "test_local: not compile",
    ),
    Mutation(
        "an image is its own partner", "hpcloss/losses/local.py",
        " & (partner != own)", "",
        "test_local: not compile",
    ),
    Mutation(
        "sure pixels are the anchors", "hpcloss/losses/entropy.py",
        "return entropy > total / valid", "return entropy < total / valid",
        "test_entropy: not compile",
    ),
    Mutation(
        "ignored pixels raise the mean entropy", "hpcloss/losses/entropy.py",
        "torch.where(valid, entropy, 0.0).sum(axes", "entropy.sum(axes",
        "test_entropy: not compile",
    ),
    Mutation(
        "a probability that is NaN makes its pixel certain", "hpcloss/losses/entropy.py",
        "loss * visible.to(loss.dtype)", "loss",
        "test_entropy: visible",
    ),
    Mutation(
        "regions without a pair may be drawn", "hpcloss/plan/sampling.py",
        "torch.where(possible, 0, -1)", "torch.zeros_like(anchors)",
        "test_sampling: region",
    ),
    Mutation(
        "both directions are added", "hpcloss/losses/entropy.py",
        "against(of_keys.region(1)), keys)) / 2", "against(of_keys.region(1)), keys))",
        "test_entropy: not compile",
    ),
    Mutation(
        "a patch has its rarest class", "hpcloss/losses/multiscale.py",
        "votes.argmax(1)", "votes.argmin(1)",
        "test_multiscale: not compile",
    ),
    Mutation(
        "keys of the other branch are trained", "hpcloss/losses/multiscale.py",
        "mean_loss(branch1, pairs, branch2.detach())", "mean_loss(branch1, pairs, branch2)",
        "test_multiscale: not compile",
    ),
    Mutation(
        "high and low entropy change places among the keys", "hpcloss/losses/entropy.py",
        "by_entropy.region(1).against(of_keys.region(0))", "by_entropy.region(1).against(of_keys.region(1))",
        "test_entropy: not compile",
    ),
    Mutation(
        "an attribute of a module is not checked", "hpcloss/losses/module.py",
        "value = check_each(self._function, {name: value})[name]", "pass",
        "test_options: checked_wherever",
    ),
    Mutation(
        "options that exclude each other pass", "hpcloss/losses/options.py",
        "        rule(**options)", "        pass",
        "test_modules: bad_hyper_parameters",
    ),
    Mutation(
        "a bound of a negative scale is negative", "hpcloss/primitives/scale.py",
        "abs(factor) * self.bound", "factor * self.bound",
        "test_backends: its_bound",
    ),
    Mutation(
        "keys of another backend are taken", "hpcloss/primitives/autograd.py",
        "if keys.backend != anchors.backend:", "if False:",
        "test_backends: another_backend",
    ),
    Mutation(
        "groups in a queue stay behind", "hpcloss/memory.py",
        "groups[drawn.order]", "groups.flip(0)",
        "test_vectors: queue",
    ),
    Mutation(
        "a sample of classes is of the largest segment's size alone", "hpcloss/plan/partition.py",
        "min(k, pixels if largest is None else largest)", "(pixels if largest is None else largest)",
        "test_region_phpc: sampl",
    ),
    Mutation(
        "scales are added", "hpcloss/losses/multiscale.py",
        "torch.stack(scales).mean()", "torch.stack(scales).sum()",
        "test_multiscale: not compile",
    ),
    Mutation(
        "unlike prototypes weigh more", "hpcloss/losses/prototype.py",
        "hardness = -1 / float(temperature)", "hardness = 1 / float(temperature)",
        "test_prototypes: not compile",
    ),
    Mutation(
        "weights of prototypes have a mean of 1 / N", "hpcloss/losses/prototype.py",
        " * sum_of(counted, gather)", "",
        "test_prototypes: not compile",
    ),
    Mutation(
        "empty prototypes are assigned", "hpcloss/losses/prototype.py",
        "scores = torch.where(there[:, None], scores, -math.inf)", "pass",
        "test_prototypes: not compile",
    ),
    Mutation(
        "the assignment ends with columns", "hpcloss/prototypes.py",
        "for axis in (-2, -1):", "for axis in (-1, -2):",
        "test_prototypes: not compile",
    ),
    Mutation(
        "the bank forgets at once", "hpcloss/prototypes.py",
        "self.momentum * held + (1 - self.momentum) * mean", "(1 - self.momentum) * held + self.momentum * mean",
        "test_prototypes: not compile",
    ),
    Mutation(
        "layers without pixels have a class", "hpcloss/prototypes.py",
        "classes = torch.where(rows.offsets.diff()[:total] > 0, classes, ABSENT)", "pass",
        "test_prototypes: not compile",
    ),
    Mutation(
        "gradients under DDP are a share", "hpcloss/distributed.py",
        "return (grad * dist.get_world_size(),)", "return (grad,)",
        "test_distributed: whole_batch and phpc and 2",
    ),
    Mutation(
        "an anchor meets itself among gathered keys", "hpcloss/distributed.py",
        "self_pos=place,", "self_pos=torch.full_like(place, -1),",
        "test_distributed: whole_batch and phpc and 2",
    ),
    Mutation(
        "what other ranks send back is dropped", "hpcloss/distributed.py",
        "*grad.shape[1:]).sum(0)[: ctx.count]", "*grad.shape[1:])[0][: ctx.count]",
        "test_distributed: whole_batch and phpc and 2",
    ),
    Mutation(
        "named pairs: negatives alone stand in the denominator", "hpcloss/compat/named_pairs.py",
        "absent = (~own)", "absent = torch.ones_like(own)",
        "test_named_pairs: value_and_gradient",
    ),
    Mutation(
        "named pairs: a pair named twice counts once", "hpcloss/compat/named_pairs.py",
        "counts.new_ones(()), accumulate=True", "counts.new_ones(())",
        "test_named_pairs: value_and_gradient",
    ),
    Mutation(
        "named pairs: the sum of a single positive is rounded", "hpcloss/compat/named_pairs.py",
        "torch.log1p(rest + (at_least_one - 1))", "torch.log(rest + at_least_one)",
        "test_named_pairs: single_positive",
    ),
    Mutation(
        "named pairs: the keys' gradient is that of the last piece", "hpcloss/compat/named_pairs.py",
        "d_keys.addmm_(slopes.T", "d_keys.zero_().addmm_(slopes.T",
        "test_named_pairs: value_and_gradient",
    ),
    Mutation(
        "named pairs: slopes without a gradient", "hpcloss/compat/named_pairs.py",
        "ctx.whole and any(needs(ctx)),", "ctx.whole,",
        "test_named_pairs: only_asked",
    ),
    Mutation(
        "named pairs: logits are not relative to the largest", "hpcloss/compat/named_pairs.py",
        "terms = _exp_(terms.sub_(top))", "top = torch.zeros_like(top)\n    terms = _exp_(terms.sub_(top))",
        "test_named_pairs: no_exponential",
    ),
]  # fmt: skip
MUTATIONS += [Mutation(*planted) for planted in PLANTED]


def suite(mutation: Mutation) -> str:
    """Where its tests are: "native", "kernels", or the name of one file."""
    if "/" in mutation.file:
        return mutation.tests.split(":")[0]
    return "kernels" if mutation.file.endswith(".py") else "native"


def selection(mutation: Mutation) -> str:
    return mutation.tests.split(":")[-1].strip()


def home(mutation: Mutation) -> Path:
    """Where its file is, from the root of the repository."""
    return {"kernels": KERNELS, "native": Path("csrc")}.get(suite(mutation), Path()) / mutation.file


def copy(folder: str) -> Path:
    """The package, the tests, what they read and their settings, alone in a folder."""
    for part in ("hpcloss", "csrc", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, folder)
    return Path(folder)


def build(folder: Path) -> Path:
    """The C++ half of the native library of the copy."""
    library = folder / "libhpcloss.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-DHPCLOSS_ONE_TARGET"]
    subprocess.run(["g++", *flags, *folder.glob("csrc/*.cpp"), "-o", library], check=True)
    return library


def run(folder: Path, tests: str, suite: str) -> tuple[bool, str]:
    """Whether the selected tests pass in the copy, and what the first failure says."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if suite.startswith(("native", "test_native")):
        environment["HPCLOSS_LIBRARY"] = str(build(folder))
    if suite == "native":
        files = [str(folder / f"tests/plan/test_{name}.py") for name in ("partition", "sampling", "native")]
    elif suite == "kernels":
        environment["TRITON_INTERPRET"] = "1"
        files = [str(folder / "tests/kernels")]
    else:
        files = [str(path) for path in folder.glob(f"tests/*/{suite}.py") if path.parent.name != "kernels"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *files, "-k", tests]
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT} s"
    if result.returncode == 0:
        return True, ""
    if result.returncode > 1:
        raise SystemExit(f"pytest -k {tests!r} did not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    said = re.search(r"^E +(?:\w+\.)*(.*)$", result.stdout, re.MULTILINE)
    lines = (result.stdout + result.stderr).strip().splitlines() or [f"exit status {result.returncode}"]
    return False, said.group(1) if said else lines[-1]


def attempt(mutation: Mutation) -> tuple[bool, str, float]:
    """Whether the tests noticed the mistake, what they said, and the seconds it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = copy(folder) / home(mutation)
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        passed, said = run(Path(folder), selection(mutation), suite(mutation))
    seconds = time.monotonic() - began
    print(f"{'SURVIVED' if passed else 'noticed '} {seconds:5.1f} s  {mutation.file}: {mutation.name}", flush=True)
    return not passed, said, seconds


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if all(word in f"{m.file} {m.name}" for word in words)]
    for mutation in chosen:
        count = (ROOT / home(mutation)).read_text().count(mutation.old)
        if count != 1:
            print(f"{mutation.file}: {mutation.name}: the text to change occurs {count} times: {mutation.old}")
            return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        unmutated = []
        for name in sorted({suite(mutation) for mutation in chosen}):
            tests = sorted({f"({selection(mutation)})" for mutation in chosen if suite(mutation) == name})
            unmutated.append(pool.submit(run, copy(f"{folder}/{name}"), " or ".join(tests), name))
        results = list(pool.map(attempt, chosen))
        wrong = [said for passed, said in (future.result() for future in unmutated) if not passed]
    print(f"\n| file | mistake | noticed by | first failure |\n{'|---' * 4}|")
    for mutation, (noticed, first, _) in zip(chosen, results, strict=True):
        print(f"| {mutation.file} | {mutation.name} | {mutation.tests if noticed else '**NOTHING**'} | {first[:100]} |")
    survived = sum(not noticed for noticed, _, _ in results)
    print(f"\n{len(chosen)} mistakes, {survived} survived; {time.monotonic() - began:.0f} s")
    for said in wrong:
        print(f"The tests fail without any mistake: {said}")
    return int(survived > 0 or bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
