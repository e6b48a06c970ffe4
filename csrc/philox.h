// Random words and sampling keys, shared by host and device. Definitions: hpcloss/plan/sampling.py.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define HPCLOSS_SHARED __host__ __device__ __forceinline__
#else
#define HPCLOSS_SHARED inline
#endif

namespace hpcloss {

enum Stream : uint32_t { kPixels = 0, kPositives = 1 };

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) at counter (low, high of `block`, third, stream).
HPCLOSS_SHARED Words philox(uint64_t block, uint32_t third, uint32_t stream, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = third, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = next0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The word of a pixel.
HPCLOSS_SHARED uint32_t pixel_word(uint64_t pixel, uint64_t seed) {
  const Words words = philox(pixel >> 2, 0, kPixels, seed);
  // Selects instead of an index: an array with a running index would live in memory on a GPU.
  const uint32_t low = pixel & 1 ? words.word[1] : words.word[0], high = pixel & 1 ? words.word[3] : words.word[2];
  return pixel & 2 ? high : low;
}

HPCLOSS_SHARED uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HPCLOSS_SHARED float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Order-preserving image of a float, and its inverse.
HPCLOSS_SHARED uint32_t image(float value) {
  const uint32_t bits = bits_of(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

HPCLOSS_SHARED float value_of_image(uint32_t key) { return float_of(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

HPCLOSS_SHARED int leading_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(word));
#elif defined(__GNUC__)
  return word ? __builtin_clz(word) : 32;
#else
  int zeros = 32;
  for (; word; word >>= 1) --zeros;
  return zeros;
#endif
}

// -log2((2 word + 1) / 2^33) with 40 fraction bits.
HPCLOSS_SHARED int64_t negative_log2(uint32_t word) {
  const int zeros = leading_zeros(word);
  const int64_t v = (int64_t{1} << 33) - ((2 * static_cast<int64_t>(word) + 1) << zeros);
  int64_t q = 7170137;
  q = ((q * v) >> 32) - 13089007;
  q = ((q * v) >> 32) + 19010875;
  q = ((q * v) >> 32) + 1840421;
  q = ((q * v) >> 32) + 26358647;
  q = ((q * v) >> 32) + 64260302;
  q = ((q * v) >> 32) + 193649403;
  q = ((q * v) >> 32) + 774540888;
  return (static_cast<int64_t>(zeros) << 40) + ((v * q) >> 22);
}

// Key of an element of positive weight in the exponential race.
HPCLOSS_SHARED uint32_t weighted_key(uint32_t word, float weight) {
  const float race = static_cast<float>(negative_log2(word)) * 0x1p-40f;  // exact
#if defined(__CUDA_ARCH__)
  return image(__fdiv_rn(race, weight));
#else
  return image(race / weight);
#endif
}

// Whether an element can be left out of the race whose last key so far is `last`, by a bound on its key that costs no
// logarithm: -log2(u) >= (1 - u) / ln 2, less a margin that covers the rounding here and in the key. A product that
// underflows does no harm: the left side is 0 or at least 1e-10.
HPCLOSS_SHARED bool loses_race(uint32_t word, float weight, uint32_t last) {
  const float at_least = static_cast<float>(~word) * (1.4426f * 0x1p-32f);
  return at_least > value_of_image(last) * weight;
}

HPCLOSS_SHARED uint32_t hardest_key(float score) { return score != score ? 0xFFFFFFFFu : image(0.0f - score); }

}  // namespace hpcloss
