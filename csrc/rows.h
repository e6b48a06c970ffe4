// One row of similarities: exponentials in vectors, and the pieces of a row that a rule counts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace hpcloss {

constexpr float kLn2 = 0.693147180559945f, kLog2E = 1.442695040888963f;

// 2^x to one unit in the last place; 0 below 2^-126. Taylor's series of 2^f, f in [-1/2, 1/2], times a power of two.
HPCLOSS_INLINE float exp2_of(float x) {  // x below 128
  const float clamped = x < -126.0f ? -126.0f : x;  // NaN stays
  const float magic = 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float rounded = (clamped + magic) - magic, f = clamped - rounded;
  float series = 1.5252734e-5f;
  series = series * f + 1.5403530e-4f;
  series = series * f + 1.3333558e-3f;
  series = series * f + 9.6181291e-3f;
  series = series * f + 5.5504109e-2f;
  series = series * f + 2.4022651e-1f;
  series = series * f + 6.9314718e-1f;
  series = series * f + 1.0f;
  const float whole = rounded == rounded ? rounded : 0.0f;  // of NaN the series is NaN already
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -126.0f ? 0.0f : series * power;
}

// log(1 + y) of 0 <= y <= 1, also of the smallest y to a few units in the last place: 2 artanh(y / (2 + y)).
HPCLOSS_INLINE float log1p_of(float y) {
  const float z = y / (2.0f + y), square = z * z;
  float series = 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * z * (series * square + 1.0f);
}

HPCLOSS_INLINE float largest(const float* x, int64_t count, float among) {
#pragma omp simd reduction(max : among)
  for (int64_t j = 0; j < count; ++j) among = x[j] > among ? x[j] : among;
  return among;
}

HPCLOSS_INLINE float exp2_and_sum(float* x, int64_t count, float shift) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    x[j] = exp2_of(x[j] - shift);
    sum += x[j];
  }
  return sum;
}

HPCLOSS_INLINE void multiply(float* x, int64_t count, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) x[j] *= factor;
}

HPCLOSS_INLINE float dot(const float* x, const float* y, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += x[j] * y[j];
  return sum;
}

// A part of a row.
struct Piece {
  int64_t first, count;
};

// The pieces of a row's positives and of its negatives: without the anchor itself.
struct Pieces {
  Piece piece[6];
  int positives = 0, all = 0;

  Pieces(int64_t pos_start, int64_t pos_end, int64_t self, int64_t keys) {
    add(pos_start, pos_end, self);
    positives = all;
    add(0, pos_start, self);
    add(pos_end, keys, self);
  }

  void add(int64_t first, int64_t end, int64_t self) {
    const bool inside = self >= first && self < end;
    add(first, inside ? self : end);
    if (inside) add(self + 1, end);
  }

  void add(int64_t first, int64_t end) {
    if (end > first) piece[all++] = {first, end - first};
  }
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where a row's own keys lie among those of its region, the first of which has number `start`.
struct Place {
  int64_t from, to, self;

  template <class Index>
  Place(Index pos_start, Index pos_end, Index self_pos, int64_t start, int64_t keys) {
    const auto place = [&](int64_t key) { return key <= start ? 0 : std::min(key - start, keys); };  // no difference < 0
    from = place(pos_start);
    to = std::max(from, place(pos_end));
    self = self_pos < 0 ? -1 : self_pos - start;
  }
};

}  // namespace hpcloss
