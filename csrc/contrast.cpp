// Losses of anchors and their slopes, row by row, where the similarities are in memory: what hpcloss/backends/dense does
// with masks. A row's positives are one interval of its keys, so each step runs over whole pieces of the row.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "rows.h"

namespace hpcloss {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kLanes = 16;  // of the widest vectors

// Whole vectors: the numbers that do not fill one take as long as some vectors of them.
int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

struct Found {
  float loss, by_scale;
  bool counted;
};

// Of one row of logits to base 2: the loss, and its slopes in place of the logits. scratch holds 4 padded rows.
HPCLOSS_CLONES Found contrast_row(float* x, int64_t keys, int64_t pos_start, int64_t pos_end, int64_t self,
                                  const hpcloss_contrast_options* options, bool needs_slopes, bool needs_scale,
                                  float* scratch) {
  const bool is_key = self >= 0 && self < keys;
  const bool is_positive = self >= pos_start && self < pos_end;  // of itself, which does not count
  const int64_t positives = pos_end - pos_start - is_positive;
  const int64_t negatives = keys - (pos_end - pos_start) - (is_key && !is_positive);
  const int32_t form = options->form;
  const bool needs_negatives = form == HPCLOSS_OWN || form == HPCLOSS_NEGATIVES;
  if (!positives || (needs_negatives && !negatives)) {
    if (needs_slopes) std::fill(x, x + keys, 0.0f);
    return {0.0f, 0.0f, false};
  }
  const int64_t length = padded(keys);
  float *logit = scratch, *weight = scratch + length, *term = scratch + 2 * length, *row = scratch + 3 * length;
  if (needs_scale) std::copy(x, x + keys, row);
  // The positives lie in two pieces, before and behind the row's own key.
  const int64_t ends[2] = {is_positive ? self : pos_end, pos_end};
  const int64_t starts[2] = {pos_start, is_positive ? self + 1 : pos_end};

  // The positives' logits and their weights, next to each other.
  std::copy(x + starts[1], x + ends[1], std::copy(x + starts[0], x + ends[0], logit));
  const float of_weights = options->of_weights;
  float heaviest = 0.0f;  // the logit of the largest weight: terms relative to it keep the differences that weights see
  if (of_weights == 0.0f) {
    std::fill(weight, weight + positives, 1.0f / static_cast<float>(positives));
  } else {
    for (int64_t j = 0; j < positives; ++j) weight[j] = of_weights * logit[j];
    const float most = largest(weight, positives, -kInfinity);
    heaviest = most / of_weights;
    multiply(weight, positives, 1.0f / exp2_and_sum(weight, positives, most));
  }

  // The denominator, over the whole row, whose vectors are aligned: the power of -inf is 0.
  if (is_key) x[self] = -kInfinity;
  if (form != HPCLOSS_ALL) std::fill(x + pos_start, x + pos_end, -kInfinity);
  float shift = -kInfinity, total = 0.0f;
  if (form == HPCLOSS_PAIR && !negatives) {
    std::fill(x, x + keys, 0.0f);
  } else {
    shift = largest(x, keys, shift);
    total = exp2_and_sum(x, keys, shift);
  }
  const float log_total = std::log2(total) + options->log2_multiplicity;  // -inf without a negative of a pair

  // The loss; of each positive its slope through the logit (in x) and the value that the weights average (in term).
  float loss = 0.0f, push = 1.0f;
  const float damped = options->damped;
  if (form == HPCLOSS_OWN || form == HPCLOSS_PAIR) {
    const float lse = negatives ? shift + log_total : -kInfinity;
    const int64_t whole = padded(positives);  // the last vector is filled with terms that are finite and weigh 0
    std::fill(logit + positives, logit + whole, negatives ? lse : 0.0f);
    std::fill(weight + positives, weight + whole, 0.0f);
    push = 0.0f;
#pragma omp simd reduction(+ : loss, push)
    for (int64_t j = 0; j < whole; ++j) {
      const float against = (lse - logit[j] * (1.0f - damped)) * kLn2, size = against < 0.0f ? -against : against;
      const float small = exp2_of(-size * kLog2E);
      const float value = (against > 0.0f ? against : 0.0f) + log1p_of(small) - damped * kLn2 * logit[j];
      const float share = (against < 0.0f ? small : 1.0f) / (1.0f + small);
      term[j] = value;
      loss += weight[j] * value;
      push += weight[j] * share;
      logit[j] = weight[j] * share;
    }
  } else {
    const float from = form == HPCLOSS_ALL ? shift : 0.0f;  // near the minimum no difference of large numbers
    float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < positives; ++j) {
      mean += weight[j] * (logit[j] - from);
      term[j] = -kLn2 * (logit[j] - heaviest);
      logit[j] = weight[j];
    }
    loss = ((form == HPCLOSS_ALL ? 0.0f : shift) + log_total - mean) * kLn2;
  }
  if (!needs_slopes) return {loss, 0.0f, true};

  if (total != 0.0f) multiply(x, keys, push / total);
  if (is_key) x[self] = 0.0f;
  const float* share = logit;
  for (int i = 0; i < 2; ++i) {
    for (int64_t j = starts[i]; j < ends[i]; ++j) x[j] -= *share++;
  }
  float by_scale = 0.0f;
  if (needs_scale) {
    if (is_key) row[self] = 0.0f;
    by_scale = dot(x, row, keys) * kLn2;
  }

  // What similarities reach otherwise than through the logits: a discount, and weights that are differentiated.
  if (damped != 0.0f || options->differentiated) {
    const float average = options->differentiated ? dot(weight, term, positives) : 0.0f;
    const float through = options->differentiated ? of_weights : 0.0f;
    int64_t at = 0;
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = starts[i]; j < ends[i]; ++j, ++at) {
        x[j] += through * weight[at] * (term[at] - average) + damped * (logit[at] - weight[at]);
      }
    }
  }
  return {loss, by_scale, true};
}

template <class Index>
void contrast_rows(float* logits, int64_t rows, int64_t rows_of_region, int64_t keys, int64_t first_key,
                   const Index* pos_start, const Index* pos_end, const Index* self_pos,
                   const hpcloss_contrast_options& options, bool needs_slopes, float* loss, uint8_t* counted,
                   float* by_scale, int32_t threads) {
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(keys, 1));
  parallel(threads, (rows + block - 1) / block, [&](int64_t item) {
    std::vector<float> scratch(static_cast<size_t>(4 * padded(keys)));
    for (int64_t i = item * block; i < std::min(rows, (item + 1) * block); ++i) {
      const Place at(pos_start[i], pos_end[i], self_pos[i], first_key + i / rows_of_region * keys, keys);
      const Found found = contrast_row(logits + i * keys, keys, at.from, at.to, at.self, &options, needs_slopes,
                                       by_scale != nullptr, scratch.data());
      loss[i] = found.loss;
      counted[i] = found.counted;
      if (by_scale) by_scale[i] = found.by_scale;
    }
  });
}

// both [i, j] = s [i, j] f_i + s [j, i] f_j for a block of rows and one of columns, and its mirror image.
HPCLOSS_CLONES void add_transpose_block(const float* slopes, int64_t n, const float* factor, float* both, int64_t i0,
                                        int64_t i1, int64_t j0, int64_t j1) {
  float upper[kBlock * kBlock], lower[kBlock * kBlock];
  const int64_t rows = i1 - i0, columns = j1 - j0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) upper[j * kBlock + i] = slopes[(i0 + i) * n + j0 + j] * factor[i0 + i];
  }
  for (int64_t j = 0; j < columns; ++j) {
    float* out = both + (j0 + j) * n + i0;
    const float* in = slopes + (j0 + j) * n + i0;
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = in[i] * factor[j0 + j] + upper[j * kBlock + i];
      out[i] = sum;
      lower[i * kBlock + j] = sum;
    }
  }
  for (int64_t i = 0; i < rows; ++i) std::copy(lower + i * kBlock, lower + i * kBlock + columns, both + (i0 + i) * n + j0);
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_add_transpose(const float* slopes, int64_t n, const float* factor, float* both, int32_t threads) {
  using namespace hpcloss;
  if (n < 0) return HPCLOSS_ERROR_SIZE;
  if (n && (!slopes || !factor || !both)) return HPCLOSS_ERROR_NULL;
  return guarded([&] {
    parallel(n < 256 ? 1 : threads, (n + kBlock - 1) / kBlock, [&](int64_t item) {
      const int64_t i0 = item * kBlock, i1 = std::min(n, i0 + kBlock);
      for (int64_t j0 = 0; j0 <= i0; j0 += kBlock) {
        add_transpose_block(slopes, n, factor, both, i0, i1, j0, std::min(n, j0 + kBlock));
      }
    });
    return int32_t{HPCLOSS_OK};
  });
}

int32_t hpcloss_contrast(float* logits, int64_t rows, int64_t rows_of_region, int64_t keys, int64_t first_key,
                         const void* pos_start, const void* pos_end, const void* self_pos, int32_t index_type,
                         const hpcloss_contrast_options* options, int32_t needs_slopes, float* loss, uint8_t* counted,
                         float* by_scale, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_rows(rows, index_type)) return error;
  if (rows_of_region < 1 || keys < 0 || first_key < 0) return HPCLOSS_ERROR_SIZE;
  if (!options) return HPCLOSS_ERROR_NULL;
  if (options->form < HPCLOSS_OWN || options->form > HPCLOSS_PAIR) return HPCLOSS_ERROR_TYPE;
  if (rows && (!pos_start || !pos_end || !self_pos || !loss || !counted || (keys && !logits))) return HPCLOSS_ERROR_NULL;
  return guarded([&] {
    const auto run = [&](auto index) {
      using In = const decltype(index)*;
      contrast_rows(logits, rows, rows_of_region, keys, first_key, static_cast<In>(pos_start), static_cast<In>(pos_end),
                    static_cast<In>(self_pos), *options, needs_slopes != 0, loss, counted, by_scale, threads);
      return int32_t{HPCLOSS_OK};
    };
    return index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{});
  });
}
