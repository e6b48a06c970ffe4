"""Planted mistakes in what computes small problems: the native library's functions of floats, and their callers.

For each: its name, the file, the text, what takes its place, and the tests that must notice, as in `mutations.py`.
"""

ROWS = "test_native_rows: test_contrast and dense and not without"
PIECES = "test_native_rows: pieces and (cross or weights_that_differ or needed)"
LSE = "test_native_lse: test_pair_lse and dense and not without and not again"
BOTH = "test_native_lse: test_pair_lse_both and not without and not again"
PACK = "test_native_lse: test_pack"
AGAIN = "test_native_rows: test_contrast and again"
WITHOUT = "test_native_rows: test_contrast and without"
C_INTERFACE = "test_native_floats: not sanitizers"

PLANTED = [
    (
        "an anchor meets itself", "csrc/rows.h",
        "add(first, inside ? self : end);",
        "add(first, end);",
        LSE,
    ),
    (
        "crossed intervals", "csrc/rows.h",
        "to = std::max(from, place(pos_end));",
        "to = place(pos_end);",
        C_INTERFACE,
    ),
    (
        "positives after the first key alone", "csrc/rows.h",
        "add(0, pos_start, self);",
        "",
        LSE,
    ),
    (
        "negatives end early", "csrc/rows.h",
        "add(pos_end, keys, self);",
        "add(pos_end, keys - 1, self);",
        LSE,
    ),
    (
        "exp2 without its third power", "csrc/rows.h",
        "series = series * f + 5.5504109e-2f;",
        "series = series * f;",
        ROWS,
    ),
    (
        "a wrong coefficient of log1p", "csrc/rows.h",
        "square + 1.0f / 3;",
        "square + 1.0f / 4;",
        ROWS,
    ),
    (
        "no shift in the denominator", "csrc/contrast.cpp",
        "shift = largest(x, keys, shift);",
        "shift = 0.0f;",
        ROWS,
    ),
    (
        "a row's own key is a negative", "csrc/contrast.cpp",
        "if (is_key) x[self] = -kInfinity;",
        "",
        ROWS,
    ),
    (
        "a row's own key has a slope", "csrc/contrast.cpp",
        "if (is_key) x[self] = 0.0f;",
        "if (is_key) x[self] = 1.0f;",
        ROWS,
    ),
    (
        "a row is its own positive", "csrc/contrast.cpp",
        "pos_end - pos_start - is_positive;",
        "pos_end - pos_start;",
        ROWS,
    ),
    (
        "a row that is no positive is counted as one", "csrc/contrast.cpp",
        "- (is_key && !is_positive);",
        "- is_key;",
        ROWS,
    ),
    (
        "positives behind the row itself are left out", "csrc/contrast.cpp",
        "{is_positive ? self : pos_end, pos_end};",
        "{is_positive ? self : pos_end, is_positive ? self + 1 : pos_end};",
        ROWS,
    ),
    (
        "numbers behind the last positive weigh", "csrc/contrast.cpp",
        "std::fill(weight + positives, weight + whole, 0.0f);",
        "std::fill(weight + positives, weight + whole, 0.25f);",
        ROWS,
    ),
    (
        "a pair without a negative has a denominator", "csrc/contrast.cpp",
        "if (form == HPCLOSS_PAIR && !negatives) {",
        "if (form == HPCLOSS_PAIR && negatives < 0) {",
        ROWS,
    ),
    (
        "vectors by who made the processor", "csrc/vectors.h",
        '"arch=x86-64-v4", "arch=x86-64-v3", "default"',
        '"arch=skylake-avx512", "arch=haswell", "default"',
        "test_build: widest",
    ),
    (
        "slopes of a row that is not counted", "csrc/contrast.cpp",
        "if (needs_slopes) std::fill(x, x + keys, 0.0f);",
        "",
        ROWS,
    ),
    (
        "the discount is no slope", "csrc/contrast.cpp",
        "+ damped * (logit[at] - weight[at]);",
        ";",
        ROWS,
    ),
    (
        "the own term is not discounted", "csrc/contrast.cpp",
        "(lse - logit[j] * (1.0f - damped))",
        "(lse - logit[j])",
        ROWS,
    ),
    (
        "multiplicity left out", "csrc/contrast.cpp",
        "std::log2(total) + options->log2_multiplicity",
        "std::log2(total)",
        ROWS,
    ),
    (
        "the negatives are pushed by all", "csrc/contrast.cpp",
        "push / total);",
        "1.0f / total);",
        ROWS,
    ),
    (
        "positives are pulled, not pushed", "csrc/contrast.cpp",
        "x[j] -= *share++;",
        "x[j] += *share++;",
        ROWS,
    ),
    (
        "positives leave the denominator of all", "csrc/contrast.cpp",
        "if (form != HPCLOSS_ALL) std::fill",
        "std::fill",
        ROWS,
    ),
    (
        "weights are not normalised", "csrc/contrast.cpp",
        "multiply(weight, positives, 1.0f / exp2_and_sum",
        "multiply(weight, positives, exp2_and_sum",
        ROWS,
    ),
    (
        "slopes of weights around 0", "csrc/contrast.cpp",
        "(term[at] - average)",
        "term[at]",
        ROWS,
    ),
    (
        "slopes of weights of large terms", "csrc/contrast.cpp",
        "(logit[j] - heaviest)",
        "logit[j]",
        ROWS,
    ),
    (
        "later regions have the keys of the first", "csrc/contrast.cpp",
        "first_key + i / rows_of_region * keys",
        "first_key",
        ROWS,
    ),
    (
        "each row its own factor twice", "csrc/contrast.cpp",
        "in[i] * factor[j0 + j]",
        "in[i] * factor[i0 + i]",
        ROWS,
    ),
    (
        "no mirror image", "csrc/contrast.cpp",
        "for (int64_t i = 0; i < rows; ++i) std::copy(lower",
        "for (int64_t i = 0; i < 0 * rows; ++i) std::copy(lower",
        "test_native_lse: threads or (test_pair_lse and region)",
    ),
    (
        "positives among negatives", "csrc/lse.cpp",
        "first(rule == HPCLOSS_NEGATIVE_KEYS ? pieces.positives : 0)",
        "first(0)",
        LSE,
    ),
    (
        "every key but the anchor", "csrc/lse.cpp",
        "rule == HPCLOSS_EVERY ? -1 : at.self",
        "at.self",
        LSE,
    ),
    (
        "the shift is not added again", "csrc/lse.cpp",
        "most + std::log2(sum)",
        "std::log2(sum)",
        LSE,
    ),
    (
        "shares whose sum is not 1", "csrc/lse.cpp",
        "const float each = weight / sum;",
        "const float each = 0.0f * sum + weight;",
        LSE,
    ),
    (
        "shares of columns whose sum is not 1", "csrc/lse.cpp",
        "column_grad[j] / weight[j]",
        "column_grad[j]",
        BOTH,
    ),
    (
        "columns without a shift", "csrc/lse.cpp",
        "sum[j] += exp2_of(x[j] - most[j]);",
        "sum[j] += exp2_of(x[j]);",
        BOTH,
    ),
    (
        "columns instead of rows", "csrc/lse.cpp",
        "out[j] += weight[j] * exp2_of",
        "out[j] = weight[j] * exp2_of",
        BOTH,
    ),
    (
        "later regions have the first's keys", "csrc/lse.cpp",
        "first_key + region(row) * keys",
        "first_key",
        LSE,
    ),
    (
        "live ignored", "csrc/pack.cpp",
        "if (row < live) {",
        "if (live >= 0) {",
        PACK,
    ),
    (
        "rows of no length have a direction", "csrc/pack.cpp",
        "length <= kShortest ? 0.0f : 1.0f / length",
        "1.0f / length",
        PACK,
    ),
    (
        "squares of long rows in fp32", "csrc/pack.cpp",
        "static_cast<double>(out[c]) * out[c]",
        "out[c] * out[c]",
        PACK,
    ),
    (
        "pixels of later images", "csrc/pack.cpp",
        "(pixel - image * map.pixels)",
        "pixel",
        PACK,
    ),
    (
        "a pixel behind the last", "csrc/pack.cpp",
        "order[i] / map.pixels >= map.images",
        "order[i] / map.pixels > map.images",
        C_INTERFACE,
    ),
    (
        "the last rows of a piece", "hpcloss/backends/pieces.py",
        "range(region.anchor_start, region.anchor_end, count)",
        "range(region.anchor_start, region.anchor_end - 1, count)",
        PIECES,
    ),
    (
        "anchors' gradients not weighted", "hpcloss/backends/pieces.py",
        "d_anchors = d_anchors * factor[:, None]",
        "d_anchors = d_anchors * scale",
        PIECES,
    ),
    (
        "keys' gradients of the first weight", "hpcloss/backends/pieces.py",
        "if bool((factor == factor[:1]).all()):",
        "if True:",
        PIECES,
    ),
    (
        "keys' gradients made again without weights", "hpcloss/backends/pieces.py",
        "anchors[rows] if factor is None else anchors[rows] * factor[rows, None]",
        "anchors[rows]",
        PIECES,
    ),
    (
        "keys' gradients not multiplied", "hpcloss/backends/pieces.py",
        "d_keys = d_keys * factor[:1]",
        "d_keys = d_keys + 0",
        "test_native_rows: one_weight",
    ),
    (
        "the scale's gradient times the scale", "hpcloss/backends/pieces.py",
        "by_scale /= scale",
        "by_scale /= 1",
        PIECES,
    ),
    (
        "all pieces in one", "hpcloss/backends/pieces.py",
        "count = max(1, MOST // region.shape()[1])",
        "count = region.shape()[0]",
        "test_native_rows: four_megabytes",
    ),
    (
        "each group over the first's slopes", "hpcloss/backends/dense/rows.py",
        "        first += size\n",
        "",
        ROWS,
    ),
    (
        "hardness of similarities", "hpcloss/backends/dense/rows.py",
        "-options.hardness * over,",
        "-options.hardness,",
        ROWS,
    ),
    (
        "discount of similarities", "hpcloss/backends/dense/rows.py",
        "options.discount * over,",
        "options.discount,",
        ROWS,
    ),
    (
        "slopes that nobody wants", "hpcloss/backends/dense/pair_contrast.py",
        "needed = needs_anchors or needs_keys or needs_scale",
        "needed = True",
        "test_native_rows: needed",
    ),
    (
        "slopes without a graph", "hpcloss/primitives/contrast.py",
        "[differentiated and need for",
        "[need for",
        "test_native_rows: needed",
    ),
    (
        "a rounded mean of the weights' terms", "hpcloss/backends/dense/forms.py",
        "from_mean.sub_(mean(shares, from_mean))",
        "pass",
        WITHOUT,
    ),
    (
        "a rounded log-sum-exp", "hpcloss/backends/dense/pair_lse.py",
        "terms.sum(dim, keepdim=True).clamp_(min=0.5)",
        "terms.new_ones(())",
        "test_native_lse: test_pair_lse and without",
    ),
    (
        "fake bounds are read", "hpcloss/backends/pytorch.py",
        " and type(bound) is Tensor",
        "",
        "test_ops: nothing_above and phpc",
    ),
]  # fmt: skip
