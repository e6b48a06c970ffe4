// Stable sort by (region, label) for any labels, and the intervals it leaves behind; on the host.
//
// Labels in a short range are counted (partition.cpp). Others are sorted digit by digit, the least first.

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "regions.h"

namespace hpcloss {
namespace {

constexpr int64_t kChunk = 2048;
constexpr int64_t kThreadWork = 1 << 16;  // pixels that are worth a thread
constexpr int64_t kFewSegments = 4096;    // counted in no time even for few pixels
constexpr int kSmallLabels = 32;          // that may be taken for all there are
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Labels from the lowest to the highest; none if the lowest is above the highest.
struct Range {
  int64_t lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();

  void include(int64_t low, int64_t high) {
    lowest = std::min(lowest, low);
    highest = std::max(highest, high);
  }
  bool empty() const { return lowest > highest; }
  // Less than the number of labels in it by one, which would not fit.
  uint64_t width() const { return static_cast<uint64_t>(highest) - static_cast<uint64_t>(lowest); }
};

// Bounds of the labels that are not ignored. Those of small labels need not be tight, and are found much faster.
template <class Label>
Range range_of(const Label* labels, int64_t begin, int64_t end, const int64_t* ignore, int64_t num_ignore) {
  constexpr Label kHighest = std::numeric_limits<Label>::max(), kLowest = std::numeric_limits<Label>::min();
  Range range;
  bool ignored[kChunk];
  for (; begin < end; begin += kChunk) {
    const Label* chunk = labels + begin;
    const int64_t size = std::min(kChunk, end - begin);
    Label bits = 0;
    for (int64_t i = 0; i < size; ++i) bits = static_cast<Label>(bits | chunk[i]);
    if (bits >= 0 && bits < kSmallLabels) {
      range.include(0, static_cast<int64_t>(bits));
      continue;
    }
    std::fill(ignored, ignored + size, false);
    for (int64_t k = 0; k < num_ignore; ++k) {
      for (int64_t i = 0; i < size; ++i) ignored[i] |= static_cast<int64_t>(chunk[i]) == ignore[k];
    }
    Label low = kHighest, high = kLowest;
    bool any = false;
    for (int64_t i = 0; i < size; ++i) {
      low = std::min(low, ignored[i] ? kHighest : chunk[i]);
      high = std::max(high, ignored[i] ? kLowest : chunk[i]);
      any |= !ignored[i];
    }
    if (any) range.include(static_cast<int64_t>(low), static_cast<int64_t>(high));
  }
  return range;
}

// Where to write; everything [n] or [num_regions].
template <class Index>
struct Plan {
  Index *order, *pos_start, *pos_end, *self_pos, *anchor_start, *anchor_end, *key_start, *key_end;
};

// A pixel and what it is sorted by. label: above the lowest. part: 2 * region for the background, 2 * region + 1 for
// other labels, 2 * num_regions for pixels that are ignored.
template <class Index>
struct Row {
  uint64_t label;
  uint32_t part;
  Index pixel;
};

// Sort by digits of key(row), which is at most `highest`.
template <class Index, class Key>
void radix_sort(std::vector<Row<Index>>& rows, std::vector<Row<Index>>& other, uint64_t highest, const Key& key) {
  for (int shift = 0; shift < 64 && highest >> shift; shift += kDigitBits) {
    int64_t next[kDigits + 1] = {};
    const auto digit = [&](const Row<Index>& row) { return key(row) >> shift & (kDigits - 1); };
    for (const Row<Index>& row : rows) ++next[digit(row) + 1];
    for (int d = 0; d < kDigits; ++d) next[d + 1] += next[d];
    for (const Row<Index>& row : rows) other[static_cast<size_t>(next[digit(row)]++)] = row;
    rows.swap(other);
  }
}

template <class Label, class Index>
void sort_digits(const Label* labels, int64_t n, const hpcloss_regions& of_pixels, int64_t num_regions,
                 const int64_t* background, const int64_t* ignore, int64_t num_ignore, const Range& range,
                 const Plan<Index>& to) {
  const int64_t* past = ignore + num_ignore;
  const auto dead = static_cast<uint32_t>(2 * num_regions);
  std::vector<Row<Index>> rows(static_cast<size_t>(n)), other(static_cast<size_t>(n));
  Regions(of_pixels, num_regions).runs(0, n, [&](int64_t from, int64_t end, int64_t region) {
    for (int64_t pixel = from; pixel < end; ++pixel) {
      const int64_t label = static_cast<int64_t>(labels[pixel]);
      const bool alive = region >= 0 && std::find(ignore, past, label) == past;
      const bool behind = !background || label != *background;
      rows[static_cast<size_t>(pixel)] = {
          alive ? static_cast<uint64_t>(label) - static_cast<uint64_t>(range.lowest) : 0,
          alive ? static_cast<uint32_t>(2 * region + behind) : dead, static_cast<Index>(pixel)};
    }
  });
  radix_sort(rows, other, range.empty() ? 0 : range.width(), [](const Row<Index>& row) { return row.label; });
  radix_sort(rows, other, dead, [](const Row<Index>& row) { return uint64_t{row.part}; });

  const auto first_of = [&](int64_t part) {
    const auto found = std::lower_bound(rows.begin(), rows.end(), part, [](const Row<Index>& row, int64_t wanted) {
      return static_cast<int64_t>(row.part) < wanted;
    });
    return static_cast<Index>(found - rows.begin());
  };
  for (int64_t r = 0; r < num_regions; ++r) {
    to.key_start[r] = r ? to.key_end[r - 1] : 0;
    to.anchor_start[r] = first_of(2 * r + 1);
    to.anchor_end[r] = to.key_end[r] = first_of(2 * r + 2);
  }
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    const Row<Index>& own = rows[static_cast<size_t>(begin)];
    for (; end < n; ++end) {
      const Row<Index>& next = rows[static_cast<size_t>(end)];
      if (next.part != own.part || next.label != own.label) break;
    }
    for (int64_t row = begin; row < end; ++row) {
      to.order[row] = rows[static_cast<size_t>(row)].pixel;
      to.pos_start[row] = static_cast<Index>(own.part == dead ? 0 : begin);
      to.pos_end[row] = static_cast<Index>(own.part == dead ? 0 : end);
      to.self_pos[row] = static_cast<Index>(row);
    }
  }
}

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_label_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                           int64_t num_regions, const int64_t* background, const int64_t* ignore, int64_t num_ignore,
                           void* order, int32_t index_type, void* pos_start, void* pos_end, void* self_pos,
                           void* anchor_start, void* anchor_end, void* key_start, void* key_end, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_label_sort(labels, label_type, n, regions, num_regions, ignore, num_ignore, order,
                                             index_type, pos_start, pos_end, self_pos, anchor_start, anchor_end,
                                             key_start, key_end)) {
    return error;
  }
  const auto count = [&](const Range& range, auto index) {
    const int64_t lowest = range.empty() ? 0 : range.lowest;
    const uint64_t width = range.empty() ? 0 : range.width();
    const auto num_classes = static_cast<int64_t>(width) + 1;
    std::vector<decltype(index)> offsets(static_cast<size_t>(num_regions * num_classes + 1));
    // A label behind the last class is none.
    const uint64_t no_class = static_cast<uint64_t>(lowest) + width + 1;
    const int64_t first = background ? *background : static_cast<int64_t>(no_class);
    const bool ranked = static_cast<uint64_t>(first) - static_cast<uint64_t>(lowest) <= width;
    int64_t outside = 0;
    const int32_t error = hpcloss_class_sort(labels, label_type, n, regions, num_regions, lowest, num_classes, first,
                                             ignore, num_ignore, order, offsets.data(), index_type, &outside, threads);
    return error ? error
                 : hpcloss_class_intervals(offsets.data(), num_regions, num_classes, ranked, n, index_type, pos_start,
                                           pos_end, self_pos, anchor_start, anchor_end, key_start, key_end, threads);
  };
  const auto run = [&](auto label, auto index) {
    using Label = decltype(label);
    using Index = decltype(index);
    const Label* typed = static_cast<const Label*>(labels);
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, n / kThreadWork));
    std::vector<Range> ranges(static_cast<size_t>(shares));
    const int64_t share = (n + shares - 1) / shares;
    parallel(shares, shares, [&](int64_t t) {
      ranges[static_cast<size_t>(t)] =
          range_of(typed, std::min(n, t * share), std::min(n, (t + 1) * share), ignore, num_ignore);
    });
    Range range;
    for (const Range& part : ranges) range.include(part.lowest, part.highest);
    const int64_t most = std::min(n + kFewSegments, kMaxIndex32 - 1) / num_regions;
    if (range.empty() ? most > 0 : most > 0 && range.width() < static_cast<uint64_t>(most)) return count(range, index);
    const Plan<Index> to{static_cast<Index*>(order),        static_cast<Index*>(pos_start),
                         static_cast<Index*>(pos_end),      static_cast<Index*>(self_pos),
                         static_cast<Index*>(anchor_start), static_cast<Index*>(anchor_end),
                         static_cast<Index*>(key_start),    static_cast<Index*>(key_end)};
    sort_digits(typed, n, *regions, num_regions, background, ignore, num_ignore, range, to);
    return int32_t{HPCLOSS_OK};
  };
  const auto with_index = [&](auto label) {
    return index_type == HPCLOSS_INT32 ? run(label, int32_t{}) : run(label, int64_t{});
  };
  return guarded([&] {
    if (label_type == HPCLOSS_UINT8) return with_index(uint8_t{});
    return label_type == HPCLOSS_INT32 ? with_index(int32_t{}) : with_index(int64_t{});
  });
}
