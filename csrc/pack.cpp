// Rows of vectors that stand next to each other in memory: gathered in a plan's order, and divided by their length.
#include <algorithm>
#include <cmath>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "vectors.h"

namespace hpcloss {
namespace {

constexpr float kShortest = 1e-12f;  // a row at most this long has no direction (hpcloss/operators.py)
constexpr float kLarge = 1e30f;      // a sum of squares that fp32 may not hold
constexpr int64_t kRows = 256;       // of one item of work

// One row, and the number by which it was multiplied.
HPCLOSS_CLONES float pack_row(const float* in, int64_t channels, bool normalize, float* out) {
  float inverse = 1.0f;
  if (normalize) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; ++c) squares += in[c] * in[c];
    if (squares < kLarge) {
      const float length = std::sqrt(squares);
      inverse = length <= kShortest ? 0.0f : 1.0f / length;
    } else {  // or NaN
      double exact = 0.0;
      for (int64_t c = 0; c < channels; ++c) exact += static_cast<double>(in[c]) * in[c];
      inverse = static_cast<float>(1.0 / std::sqrt(exact));
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] = in[c] * inverse;
  return inverse;
}

// The gradient of one row before it was divided by its length.
HPCLOSS_CLONES void unpack_row(const float* grad, const float* unit, float inverse, int64_t channels, bool normalize,
                               float* out) {
  float along = 0.0f;
  if (normalize) {
#pragma omp simd reduction(+ : along)
    for (int64_t c = 0; c < channels; ++c) along += grad[c] * unit[c];
  }
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] = (grad[c] - along * unit[c]) * inverse;
}

// Calls work(row, vector) for each row and the number of its vector, or returns an error if there is no such vector.
template <class Index, class Work>
int32_t each_row(const Index* order, int64_t rows, int64_t vectors, int32_t threads, const Work& work) {
  for (int64_t i = 0; i < rows; ++i) {
    if (order[i] < 0 || order[i] >= vectors) return HPCLOSS_ERROR_PIXEL;
  }
  parallel(threads, (rows + kRows - 1) / kRows, [&](int64_t item) {
    for (int64_t i = item * kRows; i < std::min(rows, (item + 1) * kRows); ++i) work(i, static_cast<int64_t>(order[i]));
  });
  return HPCLOSS_OK;
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_pack(const float* vectors, int64_t num_vectors, int64_t channels, const void* order, int32_t index_type,
                     int64_t rows, int64_t live, int32_t normalize, float* packed, float* inverse_norm,
                     int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_rows(rows, index_type)) return error;
  if (num_vectors < 0 || channels < 1) return HPCLOSS_ERROR_SIZE;
  if (rows && (!vectors || !order || !packed || !inverse_norm)) return HPCLOSS_ERROR_NULL;
  const auto work = [&](int64_t row, int64_t vector) {
    float* out = packed + row * channels;
    if (row < live) {
      inverse_norm[row] = pack_row(vectors + vector * channels, channels, normalize != 0, out);
    } else {  // not multiplied by zero: an ignored vector may hold inf or NaN
      std::fill(out, out + channels, 0.0f);
      inverse_norm[row] = 0.0f;
    }
  };
  return guarded([&] {
    return index_type == HPCLOSS_INT32 ? each_row(static_cast<const int32_t*>(order), rows, num_vectors, threads, work)
                                       : each_row(static_cast<const int64_t*>(order), rows, num_vectors, threads, work);
  });
}

int32_t hpcloss_unpack(const float* grad, const float* packed, const float* inverse_norm, int64_t rows, int64_t channels,
                       const void* order, int32_t index_type, int32_t normalize, float* d_vectors, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_rows(rows, index_type)) return error;
  if (channels < 1) return HPCLOSS_ERROR_SIZE;
  if (rows && (!grad || !packed || !inverse_norm || !order || !d_vectors)) return HPCLOSS_ERROR_NULL;
  const auto work = [&](int64_t row, int64_t vector) {
    unpack_row(grad + row * channels, packed + row * channels, inverse_norm[row], channels, normalize != 0,
               d_vectors + vector * channels);
  };
  return guarded([&] {
    return index_type == HPCLOSS_INT32 ? each_row(static_cast<const int32_t*>(order), rows, rows, threads, work)
                                       : each_row(static_cast<const int64_t*>(order), rows, rows, threads, work);
  });
}
