// The elements of each interval with the smallest (key, position), and positives of anchors; on the host.

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HPCLOSS_AVX2 1
#endif

namespace hpcloss {
namespace {

constexpr int64_t kChunk = 1024;          // rows whose keys are made at a time
constexpr int64_t kPart = 1 << 16;        // rows of a long interval that make one piece of work
constexpr int64_t kThreadWork = 1 << 15;  // rows that are worth a thread
constexpr int64_t kThreadDraws = 1 << 14;

#if HPCLOSS_AVX2
// `philox` of four blocks at a time, one to a 64-bit lane. The upper halves of the lanes hold whatever is left there:
// multiplications do not read them, and the last step drops them. Compilers do not find this.
__attribute__((target("avx2"))) void philox_blocks_avx2(const uint64_t* block, int64_t count, uint64_t seed,
                                                        Words* words) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i low_half = _mm256_set1_epi64x(0xFFFFFFFF);
  for (int64_t i = 0; i < count; i += 4) {
    __m256i c0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + i)), c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_setzero_si256(), c3 = _mm256_set1_epi64x(kPixels);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, multiplier0), p1 = _mm256_mul_epu32(c2, multiplier1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const __m256i first = _mm256_or_si256(_mm256_and_si256(c0, low_half), _mm256_slli_epi64(c1, 32));
    const __m256i second = _mm256_or_si256(_mm256_and_si256(c2, low_half), _mm256_slli_epi64(c3, 32));
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
    __m256i* to = reinterpret_cast<__m256i*>(words + i);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#endif

// The words of `count` blocks. Both arrays have room up to a multiple of four.
void philox_blocks(const uint64_t* block, int64_t count, uint64_t seed, Words* words) {
#if HPCLOSS_AVX2
  static const bool wide = __builtin_cpu_supports("avx2");
  if (wide) return philox_blocks_avx2(block, count, seed, words);
#endif
  for (int64_t i = 0; i < count; ++i) words[i] = philox(block[i], 0, kPixels, seed);
}

// The words of up to kChunk pixels. Four consecutive pixels share a Philox block, and in a label map mostly a class.
class PixelWords {
 public:
  template <class Index>
  PixelWords(const Index* pixels, int64_t count, uint64_t seed) {
    uint64_t block[kChunk], previous = static_cast<uint64_t>(pixels[0]) >> 2;
    uint32_t last = 0;
    block[0] = previous;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t own = static_cast<uint64_t>(pixels[i]) >> 2;
      last += own != previous;
      block[last] = previous = own;
      place_[i] = static_cast<uint16_t>(4 * last + (pixels[i] & 3));
    }
    for (int pad = 1; pad < 4 && last + pad < kChunk; ++pad) block[last + pad] = previous;
    philox_blocks(block, last + 1, seed, reinterpret_cast<Words*>(word_));
  }

  uint32_t operator[](int64_t i) const { return word_[place_[i]]; }

 private:
  uint16_t place_[kChunk];
  uint32_t word_[4 * kChunk];
};

constexpr uint64_t kNoLimit = uint64_t{1} << 32;  // above every key

// A limit below which there most likely are k of n uniform keys, and few more.
uint64_t guess(int64_t k, int64_t n) {
  const double wanted = static_cast<double>(k) + 6 * std::sqrt(static_cast<double>(k)) + 12;
  return static_cast<uint64_t>(std::min(1.0, wanted / static_cast<double>(n)) * static_cast<double>(kNoLimit));
}

// An element by key, then position in its interval: the order in which elements are chosen.
using Entry = uint64_t;
inline Entry entry(uint32_t key, int64_t position) { return uint64_t{key} << 32 | static_cast<uint64_t>(position); }
inline int64_t position_of(Entry e) { return static_cast<int64_t>(e & 0xFFFFFFFFu); }

// The k smallest of a stream of entries.
class Smallest {
 public:
  // Of at most `most` entries, by ascending position; keys of at least `limit` are left out. Room for several k makes
  // cuts rare.
  Smallest(int64_t k, int64_t most, uint64_t limit)
      : k_(static_cast<size_t>(k)),
        room_(static_cast<size_t>(std::min(most + 1, std::max<int64_t>(4 * k, 1024)))),
        limit_(limit) {}

  void add(uint32_t key, int64_t position) {
    if (key >= limit_) return;
    if (found_.empty()) found_.reserve(room_);
    found_.push_back(entry(key, position));
    if (found_.size() == room_) cut();
  }

  // No element with a key beyond this one is among the smallest.
  uint32_t last_key() const { return static_cast<uint32_t>(std::min(limit_, kNoLimit - 1)); }

  int64_t size() const { return static_cast<int64_t>(found_.size()); }

  // The k smallest of what was added, in no order.
  std::vector<Entry>& finish() {
    if (found_.size() > k_) cut();
    return found_;
  }

 private:
  void cut() {
    std::nth_element(found_.begin(), found_.begin() + static_cast<std::ptrdiff_t>(k_ - 1), found_.end());
    found_.resize(k_);
    limit_ = found_[k_ - 1] >> 32;  // an element with the same key comes behind this one
  }

  size_t k_, room_;
  uint64_t limit_;
  std::vector<Entry> found_;
};

// The hard (wrong) elements and the easy ones are two streams; every other kind has one.
struct Streams {
  Streams(int64_t k, int64_t most, uint64_t limit = kNoLimit) : hard(k, most, limit), easy(k, most, limit) {}
  Smallest hard, easy;
};

template <class Index>
class Sampler {
 public:
  Sampler(const Index* order, const Index* offsets, int64_t num_intervals, int64_t k, int32_t kind, const void* values,
          int64_t num_pixels, uint64_t seed, Index* chosen)
      : order_(order), offsets_(offsets), intervals_(num_intervals), k_(k), kind_(kind),
        values_(static_cast<const float*>(values)), wrong_(static_cast<const uint8_t*>(values)),
        num_pixels_(static_cast<uint64_t>(num_pixels)), seed_(seed), chosen_(chosen) {}

  int32_t run(Index* chosen_offsets, int64_t n, int64_t threads) {
    const int32_t error = plan(n, threads);
    if (error) return error;
    parallel(threads_, static_cast<int64_t>(pieces_.size()), [&](int64_t i) { work(pieces_[static_cast<size_t>(i)]); });
    if (beyond_) return HPCLOSS_ERROR_PIXEL;
    compact(chosen_offsets);
    return HPCLOSS_OK;
  }

 private:
  struct Piece {
    int64_t interval, begin, end;  // rows
  };
  // What the pieces of an interval that was cut into several have found so far.
  struct Pool {
    std::mutex lock;
    std::vector<Entry> hard, easy;
    int64_t missing = 0;
  };

  int32_t plan(int64_t n, int64_t threads) {
    if (const int32_t error = check_offsets(offsets_, intervals_, n)) return error;
    threads_ = std::max<int64_t>(1, std::min(threads, n / kThreadWork));
    counts_.assign(static_cast<size_t>(intervals_), 0);
    if (threads_ > 1) pools_.resize(static_cast<size_t>(intervals_));
    for (int64_t s = 0; s < intervals_; ++s) {
      const int64_t begin = offsets_[s], end = offsets_[s + 1];
      // Cutting pays only where a piece leaves most of its elements behind.
      const int64_t part = threads_ > 1 ? std::max(kPart, 8 * k_) : end - begin;
      if (begin == end) continue;
      if (end - begin > part) {
        std::unique_ptr<Pool>& pool = pools_[static_cast<size_t>(s)];
        pool = std::make_unique<Pool>();
        pool->missing = (end - begin + part - 1) / part;
      }
      for (int64_t row = begin; row < end; row += part) pieces_.push_back({s, row, std::min(row + part, end)});
    }
    return HPCLOSS_OK;
  }

  void work(const Piece& piece) {
    Pool* pool = pools_.empty() ? nullptr : pools_[static_cast<size_t>(piece.interval)].get();
    if (!pool && kind_ != HPCLOSS_WEIGHTED && piece.end - piece.begin <= k_) {
      if (!in_map(order_ + piece.begin, piece.end - piece.begin)) return;
      std::copy(order_ + piece.begin, order_ + piece.end, chosen_ + piece.interval * k_);
      counts_[static_cast<size_t>(piece.interval)] = piece.end - piece.begin;
      return;
    }
    const int64_t size = piece.end - piece.begin;
    const uint64_t limit = kind_ == HPCLOSS_UNIFORM ? guess(k_, size) : kNoLimit;
    Streams streams(k_, size, limit);
    scan(piece, streams);
    if (streams.easy.size() < std::min(k_, size) && limit < kNoLimit) {  // too low a guess
      streams = Streams(k_, size);
      scan(piece, streams);
    }
    if (beyond_) return;
    std::vector<Entry>&hard = streams.hard.finish(), &easy = streams.easy.finish();
    if (!pool) return choose(piece.interval, hard, easy);
    const std::lock_guard<std::mutex> guard(pool->lock);
    pool->hard.insert(pool->hard.end(), hard.begin(), hard.end());
    pool->easy.insert(pool->easy.end(), easy.begin(), easy.end());
    if (--pool->missing == 0) choose(piece.interval, pool->hard, pool->easy);
  }

  void scan(const Piece& piece, Streams& streams) {
    for (int64_t row = piece.begin; row < piece.end && !beyond_; row += kChunk) {
      scan(row, std::min(kChunk, piece.end - row), row - offsets_[piece.interval], streams);
    }
  }

  bool in_map(const Index* pixels, int64_t count) {
    bool beyond = false;
    for (int64_t i = 0; i < count; ++i) beyond |= static_cast<uint64_t>(pixels[i]) >= num_pixels_;
    if (beyond) beyond_ = true;
    return !beyond;
  }

  // Adds rows [row, row + count) of an interval, the first at `position` in it.
  void scan(int64_t row, int64_t count, int64_t position, Streams& streams) {
    const Index* pixels = order_ + row;
    if (!in_map(pixels, count)) return;
    if (kind_ == HPCLOSS_UNIFORM) {
      const PixelWords words(pixels, count, seed_);
      for (int64_t i = 0; i < count; ++i) streams.easy.add(words[i], position + i);
      return;
    }
    if (kind_ == HPCLOSS_HARDEST) {
      for (int64_t i = 0; i < count; ++i) streams.easy.add(hardest_key(values_[pixels[i]]), position + i);
      return;
    }
    const PixelWords words(pixels, count, seed_);
    for (int64_t i = 0; i < count; ++i) {
      if (kind_ == HPCLOSS_HARD_EASY) {
        (wrong_[pixels[i]] ? streams.hard : streams.easy).add(words[i], position + i);
        continue;
      }
      const float weight = values_[pixels[i]];
      if (!(weight > 0) || loses_race(words[i], weight, streams.easy.last_key())) continue;
      streams.easy.add(weighted_key(words[i], weight), position + i);
    }
  }

  // Writes the pixels of the chosen elements, by ascending position, to the interval's place in `chosen`.
  void choose(int64_t interval, std::vector<Entry>& hard, std::vector<Entry>& easy) {
    const int64_t num_hard = static_cast<int64_t>(hard.size()), num_easy = static_cast<int64_t>(easy.size());
    const int64_t take_hard = std::min(num_hard, std::max(k_ / 2, k_ - num_easy));
    keep(hard, take_hard);
    keep(easy, std::min(num_easy, k_ - take_hard));
    easy.insert(easy.end(), hard.begin(), hard.end());
    std::sort(easy.begin(), easy.end(), [](Entry a, Entry b) { return position_of(a) < position_of(b); });
    Index* to = chosen_ + interval * k_;
    for (const Entry e : easy) *to++ = order_[offsets_[interval] + position_of(e)];
    counts_[static_cast<size_t>(interval)] = static_cast<int64_t>(easy.size());
  }

  static void keep(std::vector<Entry>& entries, int64_t count) {
    const auto size = static_cast<size_t>(count);
    if (entries.size() <= size) return;
    std::nth_element(entries.begin(), entries.begin() + count, entries.end());
    entries.resize(size);
  }

  // Closes the gaps between the intervals' places.
  void compact(Index* chosen_offsets) {
    int64_t place = 0;
    chosen_offsets[0] = 0;
    for (int64_t s = 0; s < intervals_; ++s) {
      const int64_t count = counts_[static_cast<size_t>(s)];
      const Index* from = chosen_ + s * k_;
      if (place != s * k_) std::copy(from, from + count, chosen_ + place);
      place += count;
      chosen_offsets[s + 1] = static_cast<Index>(place);
    }
    std::fill(chosen_ + place, chosen_ + intervals_ * k_, Index{0});
  }

  const Index *order_, *offsets_;
  int64_t intervals_, k_;
  int32_t kind_;
  const float* values_;
  const uint8_t* wrong_;
  uint64_t num_pixels_, seed_;
  Index* chosen_;

  int64_t threads_ = 1;
  std::vector<Piece> pieces_;
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<int64_t> counts_;
  std::atomic<bool> beyond_{false};
};

// Floyd's algorithm: of the candidates 0 ... last - 1 take a draw below last, or the last one if it was taken before.
template <class Index>
void positives_of(int64_t anchor, int64_t first, int64_t end, int64_t own, int64_t k, uint64_t seed, Index* rows) {
  const bool has_self = own >= first && own < end;
  // As unsigned numbers, for any bounds; more than 2^32 candidates are beyond the definition.
  const uint64_t length = end > first ? static_cast<uint64_t>(end) - static_cast<uint64_t>(first) - has_self : 0;
  const int64_t candidates = static_cast<int64_t>(std::min(length, kNoLimit)), take = std::min(k, candidates);
  Words words{};
  for (int64_t draw = 0; draw < take; ++draw) {
    if (draw % 4 == 0) words = philox(static_cast<uint64_t>(anchor), static_cast<uint32_t>(draw >> 2), kPositives, seed);
    const int64_t last = candidates - take + draw;
    const auto t = static_cast<Index>((words.word[draw & 3] * (static_cast<uint64_t>(last) + 1)) >> 32);
    Index* const found = std::lower_bound(rows, rows + draw, t);
    if (found != rows + draw && *found == t) {
      rows[draw] = static_cast<Index>(last);  // above all that came before
    } else {
      std::copy_backward(found, rows + draw, rows + draw + 1);
      *found = t;
    }
  }
  for (int64_t d = 0; d < take; ++d) {
    const int64_t row = first + rows[d];
    rows[d] = static_cast<Index>(row + (has_self && row >= own));
  }
  std::fill(rows + take, rows + k, Index{-1});
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_sample(const void* order, const void* offsets, int32_t index_type, int64_t n, int64_t num_intervals,
                       int64_t k, int32_t kind, const void* values, int64_t num_pixels, const int64_t* seed,
                       void* chosen, void* chosen_offsets, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_sample(order, offsets, index_type, n, num_intervals, k, kMaxIndex32, kind, values,
                                         num_pixels, seed, chosen, chosen_offsets)) {
    return error;
  }
  const auto run = [&](auto index) {
    using Index = decltype(index);
    Sampler<Index> sampler(static_cast<const Index*>(order), static_cast<const Index*>(offsets), num_intervals, k, kind,
                           values, num_pixels, static_cast<uint64_t>(*seed), static_cast<Index*>(chosen));
    return sampler.run(static_cast<Index*>(chosen_offsets), n, threads);
  };
  return guarded([&] { return index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}); });
}

int32_t hpcloss_sample_positives(const void* pos_start, const void* pos_end, const void* self_pos, int32_t index_type,
                                 int64_t n, int64_t k, const int64_t* seed, void* rows, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_sample_positives(pos_start, pos_end, self_pos, index_type, n, k, seed, rows)) {
    return error;
  }
  const auto run = [&](auto index) {
    using Index = decltype(index);
    const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, n * k / kThreadDraws));
    const int64_t share = (n + pieces - 1) / pieces;
    parallel(threads, pieces, [&](int64_t piece) {
      for (int64_t i = piece * share; i < std::min(n, (piece + 1) * share); ++i) {
        positives_of(i, static_cast<const Index*>(pos_start)[i], static_cast<const Index*>(pos_end)[i],
                     static_cast<const Index*>(self_pos)[i], k, static_cast<uint64_t>(*seed),
                     static_cast<Index*>(rows) + i * k);
      }
    });
  };
  return guarded([&] {
    index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{});
    return HPCLOSS_OK;
  });
}
