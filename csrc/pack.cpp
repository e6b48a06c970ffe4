// Rows of a map of features: its pixels, gathered in a plan's order and divided by their length.
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

// One row, and the number by which it was multiplied. stride: between the channels of the map.
HPCLOSS_CLONES float pack_row(const float* in, int64_t stride, int64_t channels, bool normalize, float* out) {
  if (stride == 1) {
    std::copy(in, in + channels, out);
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c] = in[c * stride];
  }
  if (!normalize) return 1.0f;
  float squares = 0.0f, inverse = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += out[c] * out[c];
  if (squares < kLarge) {
    const float length = std::sqrt(squares);
    inverse = length <= kShortest ? 0.0f : 1.0f / length;
  } else {  // or NaN
    double exact = 0.0;
    for (int64_t c = 0; c < channels; ++c) exact += static_cast<double>(out[c]) * out[c];
    inverse = static_cast<float>(1.0 / std::sqrt(exact));
  }
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] *= inverse;
  return inverse;
}

// The gradient of one row before it was divided by its length.
HPCLOSS_CLONES void unpack_row(const float* grad, const float* unit, float inverse, int64_t stride, int64_t channels,
                               bool normalize, float* out) {
  float along = 0.0f;
  if (normalize) {
#pragma omp simd reduction(+ : along)
    for (int64_t c = 0; c < channels; ++c) along += grad[c] * unit[c];
  }
  if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) out[c] = (grad[c] - along * unit[c]) * inverse;
  } else {
    for (int64_t c = 0; c < channels; ++c) out[c * stride] = (grad[c] - along * unit[c]) * inverse;
  }
}

// Calls work(row, its place in the map) for each row, or returns an error if there is no such pixel.
template <class Index, class Work>
int32_t each_row(const Index* order, int64_t rows, const hpcloss_map& map, int32_t threads, const Work& work) {
  for (int64_t i = 0; i < rows; ++i) {
    if (order[i] < 0 || order[i] / map.pixels >= map.images) return HPCLOSS_ERROR_PIXEL;
  }
  parallel(threads, (rows + kRows - 1) / kRows, [&](int64_t item) {
    for (int64_t i = item * kRows; i < std::min(rows, (item + 1) * kRows); ++i) {
      const int64_t pixel = order[i], image = map.pixels == 1 ? pixel : pixel / map.pixels;
      work(i, image * map.image_stride + (pixel - image * map.pixels) * map.pixel_stride);
    }
  });
  return HPCLOSS_OK;
}

int32_t check_map(const hpcloss_map* map, int64_t rows, int32_t index_type, const void* order) {
  if (const int32_t error = check_rows(rows, index_type)) return error;
  if (!map) return HPCLOSS_ERROR_NULL;
  if (map->images < 0 || map->pixels < 1 || map->channels < 1) return HPCLOSS_ERROR_SIZE;
  return rows && !order ? HPCLOSS_ERROR_NULL : HPCLOSS_OK;
}

template <class Work>
int32_t each_row(const void* order, int32_t index_type, int64_t rows, const hpcloss_map& map, int32_t threads,
                 const Work& work) {
  return guarded([&] {
    return index_type == HPCLOSS_INT32 ? each_row(static_cast<const int32_t*>(order), rows, map, threads, work)
                                       : each_row(static_cast<const int64_t*>(order), rows, map, threads, work);
  });
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_pack(const float* features, const hpcloss_map* map, const void* order, int32_t index_type, int64_t rows,
                     int64_t live, int32_t normalize, float* packed, float* inverse_norm, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_map(map, rows, index_type, order)) return error;
  if (rows && (!features || !packed || !inverse_norm)) return HPCLOSS_ERROR_NULL;
  return each_row(order, index_type, rows, *map, threads, [&](int64_t row, int64_t place) {
    float* out = packed + row * map->channels;
    if (row < live) {
      inverse_norm[row] = pack_row(features + place, map->channel_stride, map->channels, normalize != 0, out);
    } else {  // not multiplied by zero: an ignored pixel may hold inf or NaN
      std::fill(out, out + map->channels, 0.0f);
      inverse_norm[row] = 0.0f;
    }
  });
}

int32_t hpcloss_unpack(const float* grad, const float* packed, const float* inverse_norm, const hpcloss_map* map,
                       const void* order, int32_t index_type, int64_t rows, int32_t normalize, float* d_features,
                       int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_map(map, rows, index_type, order)) return error;
  if (rows && (!grad || !packed || !inverse_norm || !d_features)) return HPCLOSS_ERROR_NULL;
  return each_row(order, index_type, rows, *map, threads, [&](int64_t row, int64_t place) {
    unpack_row(grad + row * map->channels, packed + row * map->channels, inverse_norm[row], map->channel_stride,
               map->channels, normalize != 0, d_features + place);
  });
}
