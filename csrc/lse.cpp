// Log-sum-exps of rows and columns of similarities that are in memory, and their slopes.
#include <vector>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "rows.h"

namespace hpcloss {
namespace {

constexpr int64_t kItem = 1 << 16;  // numbers of one item of work

// The pieces of a row that a rule counts.
struct Counted {
  Pieces pieces;
  int first, end;

  Counted(const Place& at, int64_t keys, int32_t rule)
      : pieces(at.from, at.to, rule == HPCLOSS_EVERY ? -1 : at.self, keys),
        first(rule == HPCLOSS_NEGATIVE_KEYS ? pieces.positives : 0),
        end(rule == HPCLOSS_POSITIVE_KEYS ? pieces.positives : pieces.all) {}
};

// log2 of the sum of 2^(factor x) over the pieces.
HPCLOSS_CLONES float lse_row(const float* x, const Counted* counted, float factor) {
  float most = -kInfinity, sum = 0.0f;
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
    const float* from = x + piece.first;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < piece.count; ++j) most = factor * from[j] > most ? factor * from[j] : most;
  }
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
    const float* from = x + piece.first;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < piece.count; ++j) sum += exp2_of(factor * from[j] - most);
  }
  return counted->end > counted->first ? most + std::log2(sum) : -kInfinity;
}

// out += weight 2^(factor x - lse) over the pieces. terms [keys] is scratch. The powers are divided by their sum: an lse
// of size 1000 is rounded by so much that the sum is 1 to four digits only.
HPCLOSS_CLONES void add_slopes(const float* x, const Counted* counted, float factor, float lse, float weight, float* terms,
                               float* out) {
  float sum = 0.0f;
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
    const float* from = x + piece.first;
    float* term = terms + piece.first;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < piece.count; ++j) {
      term[j] = exp2_of(factor * from[j] - lse);
      sum += term[j];
    }
  }
  const float each = weight / sum;
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
#pragma omp simd
    for (int64_t j = piece.first; j < piece.first + piece.count; ++j) out[j] += each * terms[j];
  }
}

HPCLOSS_CLONES void column_largest(const float* x, const Counted* counted, float* most) {
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
#pragma omp simd
    for (int64_t j = piece.first; j < piece.first + piece.count; ++j) most[j] = x[j] > most[j] ? x[j] : most[j];
  }
}

HPCLOSS_CLONES void column_sums(const float* x, const Counted* counted, const float* most, float* sum) {
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
#pragma omp simd
    for (int64_t j = piece.first; j < piece.first + piece.count; ++j) sum[j] += exp2_of(x[j] - most[j]);
  }
}

HPCLOSS_CLONES void add_column_slopes(const float* x, const Counted* counted, const float* lse, const float* weight,
                                      float* out) {
  for (int i = counted->first; i < counted->end; ++i) {
    const Piece piece = counted->pieces.piece[i];
#pragma omp simd
    for (int64_t j = piece.first; j < piece.first + piece.count; ++j) out[j] += weight[j] * exp2_of(x[j] - lse[j]);
  }
}

template <class Index>
struct Rows {
  int64_t rows, rows_of_region, keys, first_key;
  const Index *pos_start, *pos_end, *self_pos;
  int32_t rule;

  int64_t region(int64_t row) const { return row / rows_of_region; }
  int64_t columns() const { return (rows + rows_of_region - 1) / rows_of_region * keys; }  // of all regions

  Counted counted(int64_t row) const {
    return Counted(Place(pos_start[row], pos_end[row], self_pos[row], first_key + region(row) * keys, keys), keys, rule);
  }

  // Calls work(row, counted, scratch) for each row, with scratch [2, keys].
  template <class Work>
  void each(int32_t threads, const Work& work) const {
    const int64_t block = std::max<int64_t>(1, kItem / std::max<int64_t>(keys, 1));
    parallel(threads, (rows + block - 1) / block, [&](int64_t item) {
      std::vector<float> scratch(static_cast<size_t>(2 * keys));
      for (int64_t row = item * block; row < std::min(rows, (item + 1) * block); ++row) {
        work(row, counted(row), scratch.data());
      }
    });
  }
};

// Checks what all functions here take and calls work(rows) with the rows as their type of index has them.
template <class Work>
int32_t with_rows(const hpcloss_rows* rows, int32_t rule, const Work& work) {
  if (!rows) return HPCLOSS_ERROR_NULL;
  if (const int32_t error = check_rows(rows->rows, rows->index_type)) return error;
  if (rows->rows_of_region < 1 || rows->keys < 0 || rows->first_key < 0) return HPCLOSS_ERROR_SIZE;
  if (rule < HPCLOSS_POSITIVE_KEYS || rule > HPCLOSS_EVERY) return HPCLOSS_ERROR_TYPE;
  if (rows->rows && (!rows->pos_start || !rows->pos_end || !rows->self_pos)) return HPCLOSS_ERROR_NULL;
  return guarded([&] {
    const auto run = [&](auto index) {
      using In = const decltype(index)*;
      work(Rows<decltype(index)>{rows->rows, rows->rows_of_region, rows->keys, rows->first_key,
                                 static_cast<In>(rows->pos_start), static_cast<In>(rows->pos_end),
                                 static_cast<In>(rows->self_pos), rule});
      return int32_t{HPCLOSS_OK};
    };
    return rows->index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{});
  });
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_lse(const float* logits, const hpcloss_rows* rows, int32_t rule, const float* factors, int32_t count,
                    float* lse, int32_t threads) {
  using namespace hpcloss;
  if (count < 1) return HPCLOSS_ERROR_SIZE;
  if (rows && rows->rows && (!factors || !lse || (rows->keys && !logits))) return HPCLOSS_ERROR_NULL;
  return with_rows(rows, rule, [&](const auto& all) {
    all.each(threads, [&](int64_t row, const Counted& counted, float*) {
      for (int32_t k = 0; k < count; ++k) lse[row * count + k] = lse_row(logits + row * all.keys, &counted, factors[k]);
    });
  });
}

int32_t hpcloss_lse_slopes(float* logits, const hpcloss_rows* rows, int32_t rule, const float* factors, int32_t count,
                           const float* lse, const float* grad, int32_t threads) {
  using namespace hpcloss;
  if (count < 1) return HPCLOSS_ERROR_SIZE;
  if (rows && rows->rows && (!factors || !lse || !grad || (rows->keys && !logits))) return HPCLOSS_ERROR_NULL;
  return with_rows(rows, rule, [&](const auto& all) {
    all.each(threads, [&](int64_t row, const Counted& counted, float* scratch) {
      float* x = logits + row * all.keys;
      std::fill(scratch, scratch + all.keys, 0.0f);
      for (int32_t k = 0; k < count; ++k) {
        const float of = lse[row * count + k];
        const float weight = factors[k] * grad[row * count + k];
        if (of != -kInfinity) add_slopes(x, &counted, factors[k], of, weight, scratch + all.keys, scratch);
      }
      std::copy(scratch, scratch + all.keys, x);
    });
  });
}

int32_t hpcloss_lse_columns(const float* logits, const hpcloss_rows* rows, int32_t rule, float* lse) {
  using namespace hpcloss;
  if (rows && rows->rows && rows->keys && (!logits || !lse)) return HPCLOSS_ERROR_NULL;
  return with_rows(rows, rule, [&](const auto& all) {
    const int64_t columns = all.columns();
    std::vector<float> sum(static_cast<size_t>(columns));
    std::fill(lse, lse + columns, -kInfinity);
    const auto each = [&](const auto& work) {
      for (int64_t row = 0; row < all.rows; ++row) {
        work(logits + row * all.keys, all.counted(row), all.region(row) * all.keys);
      }
    };
    each([&](const float* x, const Counted& counted, int64_t at) { column_largest(x, &counted, lse + at); });
    each([&](const float* x, const Counted& counted, int64_t at) {
      column_sums(x, &counted, lse + at, sum.data() + at);
    });
    for (int64_t j = 0; j < columns; ++j) {
      if (lse[j] != -kInfinity) lse[j] += std::log2(sum[j]);
    }
  });
}

int32_t hpcloss_lse_both_slopes(float* logits, const hpcloss_rows* rows, int32_t rule, const float* row_lse,
                                const float* row_grad, const float* column_lse, const float* column_grad,
                                int32_t threads) {
  using namespace hpcloss;
  if (rows && rows->rows && rows->keys && (!logits || !row_lse || !row_grad || !column_lse || !column_grad)) {
    return HPCLOSS_ERROR_NULL;
  }
  return with_rows(rows, rule, [&](const auto& all) {
    std::vector<float> weight(static_cast<size_t>(all.columns()));  // of a column, by the sum of its powers
    for (int64_t row = 0; row < all.rows; ++row) {
      const int64_t at = all.region(row) * all.keys;
      const Counted counted = all.counted(row);
      column_sums(logits + row * all.keys, &counted, column_lse + at, weight.data() + at);
    }
    for (int64_t j = 0; j < all.columns(); ++j) weight[j] = weight[j] == 0.0f ? 0.0f : column_grad[j] / weight[j];
    all.each(threads, [&](int64_t row, const Counted& counted, float* scratch) {
      float* x = logits + row * all.keys;
      const int64_t at = all.region(row) * all.keys;
      std::fill(scratch, scratch + all.keys, 0.0f);
      if (row_lse[row] != -kInfinity) {
        add_slopes(x, &counted, 1.0f, row_lse[row], row_grad[row], scratch + all.keys, scratch);
      }
      add_column_slopes(x, &counted, column_lse + at, weight.data() + at, scratch);
      std::copy(scratch, scratch + all.keys, x);
    });
  });
}
