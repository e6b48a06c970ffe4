// Counting sort by (region, class), and the intervals it leaves behind; on the host.

#include <algorithm>
#include <memory>
#include <vector>

#include "checks.h"
#include "hpcloss.h"
#include "parallel.h"
#include "regions.h"

namespace hpcloss {
namespace {

constexpr int64_t kChunk = 2048;          // segments of that many pixels stay in the first cache
constexpr int64_t kThreadWork = 1 << 16;  // pixels that are worth a thread

// What a label says: its rank, or that its pixel is ignored.
class Classes {
 public:
  static constexpr uint32_t kIgnored = 0xFFFFFFFFu;

  Classes(int64_t first, int64_t count, int64_t background, const int64_t* ignore, int64_t num_ignore)
      : first_(static_cast<uint64_t>(first)), size_(static_cast<uint64_t>(count)), ignore_(ignore, ignore + num_ignore) {
    const uint64_t behind = static_cast<uint64_t>(background) - first_;
    rank_.assign(size_ + 1, kIgnored);  // the last for all labels that are no class
    for (uint64_t c = 0; c < size_; ++c) {
      rank_[c] = static_cast<uint32_t>(behind < size_ ? (c == behind ? 0 : c + (c < behind)) : c);
    }
    for (const int64_t label : ignore_) rank_[std::min(number(label), size_)] = kIgnored;
  }

  // The class number of a label, or one of at least size(): differences wrap around.
  uint64_t number(int64_t label) const { return static_cast<uint64_t>(label) - first_; }
  uint64_t size() const { return size_; }
  // By class number, with size() for all others.
  const uint32_t* ranks() const { return rank_.data(); }
  bool is_ignored(int64_t label) const { return std::find(ignore_.begin(), ignore_.end(), label) != ignore_.end(); }

 private:
  uint64_t first_, size_;
  std::vector<int64_t> ignore_;
  std::vector<uint32_t> rank_;
};

template <class Label, class Index>
struct ClassSort {
  const Label* labels;
  int64_t n;
  const Regions& regions;
  const Classes& classes;
  uint32_t num_classes, num_segments;

  // Segment of each pixel in [begin, end), num_segments for those that are ignored; returns how many labels are none.
  int64_t segments(int64_t begin, int64_t end, uint32_t* segment) const {
    const uint32_t *ranks = classes.ranks(), none = num_segments;
    const uint64_t size = classes.size();
    int64_t outside = 0;
    regions.runs(begin, end, [&](int64_t from, int64_t to, int64_t region) {
      const uint32_t first = static_cast<uint32_t>(region) * num_classes;
      const bool exists = region >= 0;
      bool strays = false;
      for (int64_t pixel = from; pixel < to; ++pixel) {
        const uint64_t number = classes.number(static_cast<int64_t>(labels[pixel]));
        const uint32_t rank = ranks[std::min(number, size)];
        strays |= number >= size;
        segment[pixel - begin] = rank == Classes::kIgnored || !exists ? none : first + rank;
      }
      for (int64_t pixel = from; strays && pixel < to; ++pixel) {
        const int64_t label = static_cast<int64_t>(labels[pixel]);
        outside += classes.number(label) >= size && !classes.is_ignored(label);
      }
    });
    return outside;
  }

  // Calls body(pixel, count, segment) for `count` pixels of one segment at a time, in order; fill(from, to, segment)
  // gives the segments of a chunk.
  template <class Fill, class Body>
  void each(int64_t begin, int64_t end, const Fill& fill, const Body& body) const {
    uint32_t segment[kChunk];
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t size = std::min(kChunk, end - chunk);
      fill(chunk, chunk + size, segment);
      int64_t i = 0;
      // Pixels side by side are mostly of one class. In fours a counter waits for its last update a quarter as often,
      // and where classes change at every pixel little is lost.
      for (; i + 4 <= size; i += 4) {
        const uint32_t* s = segment + i;
        if (s[0] == s[1] && s[0] == s[2] && s[0] == s[3]) {
          body(chunk + i, 4, s[0]);
        } else {
          for (int j = 0; j < 4; ++j) body(chunk + i + j, 1, s[j]);
        }
      }
      for (; i < size; ++i) body(chunk + i, 1, segment[i]);
    }
  }

  // Kept: integers that hold every segment. What the first look at a pixel finds is kept for the second: it is cheaper,
  // and the two agree even where somebody writes to the labels meanwhile.
  template <class Kept>
  void run(Index* order, Index* offsets, int64_t* outside, int64_t threads) const {
    const int64_t rows = int64_t{num_segments} + 1;
    // Every thread counts all segments.
    threads = std::max<int64_t>(1, std::min(threads, n / std::max(kThreadWork, rows)));
    const int64_t share = (n + threads - 1) / threads;
    const auto begin = [&](int64_t t) { return std::min(n, t * share); };
    const std::unique_ptr<Kept[]> kept(new Kept[static_cast<size_t>(n)]);
    std::vector<std::vector<int64_t>> next(static_cast<size_t>(threads));  // first of counts, then of places
    std::vector<int64_t> strays(static_cast<size_t>(threads));
    parallel(threads, threads, [&](int64_t t) {
      std::vector<int64_t>& count = next[static_cast<size_t>(t)];
      count.assign(static_cast<size_t>(rows), 0);
      const auto find = [&](int64_t from, int64_t to, uint32_t* segment) {
        strays[static_cast<size_t>(t)] += segments(from, to, segment);
        std::copy(segment, segment + (to - from), kept.get() + from);
      };
      each(begin(t), begin(t + 1), find, [&](int64_t, int m, uint32_t s) { count[s] += m; });
    });
    int64_t place = 0;
    for (int64_t s = 0; s < rows; ++s) {
      offsets[s] = static_cast<Index>(place);
      for (std::vector<int64_t>& count : next) {
        const int64_t first = place;
        place += count[static_cast<size_t>(s)];
        count[static_cast<size_t>(s)] = first;
      }
    }
    *outside = 0;
    for (const int64_t count : strays) *outside += count;
    parallel(threads, threads, [&](int64_t t) {
      int64_t* places = next[static_cast<size_t>(t)].data();
      const auto recall = [&](int64_t from, int64_t to, uint32_t* segment) {
        std::copy(kept.get() + from, kept.get() + to, segment);
      };
      each(begin(t), begin(t + 1), recall, [&](int64_t pixel, int m, uint32_t s) {
        Index* to = order + places[s];
        places[s] += m;
        for (int j = 0; j < m; ++j) to[j] = static_cast<Index>(pixel + j);
      });
    });
  }
};

// Rows [begin, end) of a share for each of a few threads.
template <class Work>
void in_shares(int64_t n, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, n / kThreadWork));
  const int64_t share = (n + threads - 1) / threads;
  parallel(threads, threads, [&](int64_t t) { work(std::min(n, t * share), std::min(n, (t + 1) * share)); });
}

template <class Index>
struct Intervals {
  const Index* offsets;
  Index *pos_start, *pos_end, *self_pos, *anchor_start, *anchor_end, *key_start, *key_end;

  int32_t run(int64_t num_regions, int64_t num_classes, bool background_first, int64_t n, int64_t threads) const {
    const int64_t num_segments = num_regions * num_classes;
    if (const int32_t error = check_offsets(offsets, num_segments, n)) return error;
    for (int64_t r = 0; r < num_regions; ++r) {
      const Index* own = offsets + r * num_classes;
      anchor_start[r] = own[background_first];
      key_start[r] = own[0];
      anchor_end[r] = key_end[r] = own[num_classes];
    }
    const Index* past = offsets + num_segments + 1;
    in_shares(n, threads, [&](int64_t begin, int64_t end) {
      const Index* bound = std::upper_bound(offsets, past, static_cast<Index>(begin));
      for (int64_t row = begin; row < end;) {
        // Rows up to `bound` lie in one segment, or before the first, or past the last.
        while (bound != past && *bound <= row) ++bound;
        const int64_t to = bound == past ? end : std::min<int64_t>(*bound, end);
        const bool inside = bound != offsets && bound != past;
        std::fill(pos_start + row, pos_start + to, inside ? bound[-1] : 0);
        std::fill(pos_end + row, pos_end + to, inside ? *bound : 0);
        for (; row < to; ++row) self_pos[row] = static_cast<Index>(row);
      }
    });
    return HPCLOSS_OK;
  }
};

template <class Index>
struct Counts {
  const Index *pos_start, *pos_end, *self_pos, *anchor_start, *anchor_end, *key_start, *key_end;

  // Calls write(row, positives, negatives) for each row.
  template <class Write>
  int32_t run(int64_t n, int64_t num_regions, int64_t threads, const Write& write) const {
    in_shares(n, threads, [&](int64_t begin, int64_t end) {
      int64_t r = std::upper_bound(anchor_end, anchor_end + num_regions, static_cast<Index>(begin)) - anchor_end;
      for (int64_t row = begin; row < end; ++row) {
        while (r < num_regions && anchor_end[r] <= row) ++r;
        if (r == num_regions || anchor_start[r] > row) {
          write(row, Index{0}, Index{0});
          continue;
        }
        const Index self = self_pos[row];
        const bool in_class = self >= pos_start[row] && self < pos_end[row];
        const bool in_region = self >= key_start[r] && self < key_end[r];
        const Index positives = pos_end[row] - pos_start[row] - in_class;
        write(row, positives, key_end[r] - key_start[r] - in_region - positives);
      }
    });
    return HPCLOSS_OK;
  }
};

}  // namespace
}  // namespace hpcloss

int32_t hpcloss_class_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                           int64_t num_regions, int64_t first_class, int64_t num_classes, int64_t background,
                           const int64_t* ignore, int64_t num_ignore, void* order, void* offsets, int32_t index_type,
                           int64_t* outside, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_class_sort(labels, label_type, n, regions, num_regions, num_classes, ignore,
                                             num_ignore, order, offsets, index_type, outside)) {
    return error;
  }
  return guarded([&] {
    const Regions of_pixels(*regions, num_regions);
    const Classes classes(first_class, num_classes, background, ignore, num_ignore);
    const auto run = [&](auto label, auto index) {
      using Label = decltype(label);
      using Index = decltype(index);
      const ClassSort<Label, Index> sort{static_cast<const Label*>(labels), n, of_pixels, classes,
                                         static_cast<uint32_t>(num_classes),
                                         static_cast<uint32_t>(num_regions * num_classes)};
      const auto sort_with = [&](auto kept) {
        sort.template run<decltype(kept)>(static_cast<Index*>(order), static_cast<Index*>(offsets), outside, threads);
      };
      sort.num_segments < 0xFFFF ? sort_with(uint16_t{}) : sort_with(uint32_t{});
    };
    const auto with_index = [&](auto label) {
      index_type == HPCLOSS_INT32 ? run(label, int32_t{}) : run(label, int64_t{});
    };
    label_type == HPCLOSS_UINT8 ? with_index(uint8_t{})
    : label_type == HPCLOSS_INT32 ? with_index(int32_t{}) : with_index(int64_t{});
    return HPCLOSS_OK;
  });
}

int32_t hpcloss_class_intervals(const void* offsets, int64_t num_regions, int64_t num_classes, int32_t background_first,
                                int64_t n, int32_t index_type, void* pos_start, void* pos_end, void* self_pos,
                                void* anchor_start, void* anchor_end, void* key_start, void* key_end, int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_class_intervals(offsets, num_regions, num_classes, n, index_type, pos_start, pos_end,
                                                  self_pos, anchor_start, anchor_end, key_start, key_end)) {
    return error;
  }
  const auto run = [&](auto index) {
    using Out = decltype(index)*;
    return Intervals<decltype(index)>{
        static_cast<const decltype(index)*>(offsets), static_cast<Out>(pos_start), static_cast<Out>(pos_end),
        static_cast<Out>(self_pos), static_cast<Out>(anchor_start), static_cast<Out>(anchor_end),
        static_cast<Out>(key_start), static_cast<Out>(key_end)}
        .run(num_regions, num_classes, background_first != 0, n, threads);
  };
  return guarded([&] { return index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}); });
}

int32_t hpcloss_pair_counts(const void* pos_start, const void* pos_end, const void* self_pos, const void* anchor_start,
                            const void* anchor_end, const void* key_start, const void* key_end, int64_t n,
                            int64_t num_regions, int32_t index_type, void* positives, void* negatives,
                            int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_pair_counts(pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start,
                                              key_end, n, num_regions, index_type, positives, negatives)) {
    return error;
  }
  const auto run = [&](auto index) {
    using Index = decltype(index);
    using In = const Index*;
    const Counts<Index> counts{static_cast<In>(pos_start),    static_cast<In>(pos_end),    static_cast<In>(self_pos),
                               static_cast<In>(anchor_start), static_cast<In>(anchor_end), static_cast<In>(key_start),
                               static_cast<In>(key_end)};
    return counts.run(n, num_regions, threads, [&](int64_t row, Index same, Index other) {
      static_cast<Index*>(positives)[row] = same;
      static_cast<Index*>(negatives)[row] = other;
    });
  };
  return guarded([&] { return index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}); });
}

int32_t hpcloss_pair_counted(const void* pos_start, const void* pos_end, const void* self_pos, const void* anchor_start,
                             const void* anchor_end, const void* key_start, const void* key_end, int64_t n,
                             int64_t num_regions, int32_t index_type, int32_t need_negatives, uint8_t* counted,
                             int32_t threads) {
  using namespace hpcloss;
  if (const int32_t error = check_pair_counts(pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start,
                                              key_end, n, num_regions, index_type, counted, counted)) {
    return error;
  }
  const auto run = [&](auto index) {
    using Index = decltype(index);
    using In = const Index*;
    const Counts<Index> counts{static_cast<In>(pos_start),    static_cast<In>(pos_end),    static_cast<In>(self_pos),
                               static_cast<In>(anchor_start), static_cast<In>(anchor_end), static_cast<In>(key_start),
                               static_cast<In>(key_end)};
    return counts.run(n, num_regions, threads, [&](int64_t row, Index same, Index other) {
      counted[row] = same > 0 && (!need_negatives || other > 0);
    });
  };
  return guarded([&] { return index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}); });
}

int32_t hpcloss_abi(void) { return HPCLOSS_ABI; }
