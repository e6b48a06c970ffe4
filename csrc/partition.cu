// Counting sort by (region, class), and the intervals it leaves behind; on a CUDA device.
//
// A radix sort of (segment, pixel) with digits so wide that mostly one pass is enough. A pass is three kernels: each
// block counts the digits of its tile; the counts of a digit are summed up over the blocks; each block places its tile.
// Every place is decided by counting what comes before, never by the order in which threads arrive.

#include "checks.h"
#include "cuda.h"
#include "pixels.h"

namespace hpcloss {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kSteps = 16, kTile = kThreads * kSteps;  // pixels of a thread, of a block
constexpr int kDigitBits = 11, kMaxBins = 1 << kDigitBits;
constexpr uint32_t kNoDigit = 0xFFFFFFFFu;  // of a thread without a pixel

// What decides the segment of a pixel, by value in every kernel.
struct Segments : Pixels {
  int64_t first_class, num_classes, background;

  // Segment of the pixel, their number if it is ignored; *stray: its label is no class and not to be ignored.
  template <class Index>
  __device__ uint32_t of(Index pixel, bool* stray) const {
    const int64_t label = label_of(pixel);
    const bool ignored = is_ignored(label);
    const uint64_t number = static_cast<uint64_t>(label) - static_cast<uint64_t>(first_class);
    const uint64_t behind = static_cast<uint64_t>(background) - static_cast<uint64_t>(first_class);
    const bool is_class = number < static_cast<uint64_t>(num_classes);
    *stray = !is_class && !ignored;
    const int64_t region = region_of(pixel);
    if (ignored || !is_class || region < 0) return static_cast<uint32_t>(num_regions * num_classes);
    uint64_t rank = number;
    if (behind < static_cast<uint64_t>(num_classes)) rank = number == behind ? 0 : number + (number < behind);
    return static_cast<uint32_t>(region * num_classes + static_cast<int64_t>(rank));
  }
};

// One digit of the segments of the pixels in some order; null: the pixels as they come.
template <class Index>
struct Pass {
  Segments segments;
  const Index* from;
  int64_t n;
  int shift, bins, blocks;

  __device__ bool pixel(int64_t row, Index* pixel) const {
    if (row >= n) return false;
    *pixel = from ? from[row] : static_cast<Index>(row);
    return true;
  }
  __device__ uint32_t digit(Index pixel, bool* stray) const {
    return segments.of(pixel, stray) >> shift & (kMaxBins - 1);
  }
};

// counts [(bins + 1) * blocks] <- how often each digit occurs in the tile of each block, digit by digit; last the labels
// that are no class.
template <class Index>
__global__ void __launch_bounds__(kThreads) count_kernel(Pass<Index> pass, Index* counts) {
  uint32_t* count = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int bin = static_cast<int>(threadIdx.x); bin <= pass.bins; bin += kThreads) count[bin] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  for (int step = 0; step < kSteps; ++step) {
    Index pixel;
    bool stray = false;
    uint32_t digit = kNoDigit;
    if (pass.pixel(first + step * kThreads, &pixel)) digit = pass.digit(pixel, &stray);
    // One addition for all lanes with the same digit: in a label map there are many.
    const unsigned peers = __match_any_sync(kAllLanes, digit), strays = __ballot_sync(kAllLanes, stray);
    if (digit != kNoDigit && __ffs(static_cast<int>(peers)) == lane + 1) {
      atomicAdd(count + digit, static_cast<uint32_t>(__popc(peers)));
    }
    if (lane == 0 && strays) atomicAdd(count + pass.bins, static_cast<uint32_t>(__popc(strays)));
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin <= pass.bins; bin += kThreads) {
    counts[static_cast<int64_t>(bin) * pass.blocks + blockIdx.x] = static_cast<Index>(count[bin]);
  }
}

// Each block turns the counts of one digit into their exclusive sums over the blocks before, and writes the total.
template <class Index>
__global__ void __launch_bounds__(kThreads) sum_kernel(Index* counts, Index* totals, int bins, int blocks,
                                                       int64_t* outside) {
  Index* sums = reinterpret_cast<Index*>(dynamic_shared());
  const int bin = static_cast<int>(blockIdx.x);
  const Index total = exclusive_sums(counts + static_cast<int64_t>(bin) * blocks, blocks, sums);
  if (threadIdx.x) return;
  if (bin < bins) {
    totals[bin] = total;
  } else if (outside) {
    *outside = static_cast<int64_t>(total);
  }
}

// to [n] <- the pixels, stably by digit; offsets [bins], if not null, <- first row of each digit.
template <class Index>
__global__ void __launch_bounds__(kThreads) place_kernel(Pass<Index> pass, const Index* counts, const Index* totals,
                                                         Index* to, Index* offsets) {
  Index* sums = reinterpret_cast<Index*>(dynamic_shared());  // [kWarps + 1], and padding
  Index* base = sums + 2 * kWarps;                           // [bins] first row of each digit in this tile
  uint16_t* place = reinterpret_cast<uint16_t*>(base + pass.bins);  // [kWarps, bins] then of each warp, from there on
  uint16_t* digits = place + kWarps * pass.bins;             // [kTile] kept for the second look at them
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;

  // Every block sums the totals up for itself: they are few, and a kernel less is launched.
  const int share = (pass.bins + kThreads - 1) / kThreads, begin = thread * share;
  const int end = begin + share < pass.bins ? begin + share : pass.bins;
  Index own = 0;
  for (int bin = begin; bin < end; ++bin) own += totals[bin];
  Index first = exclusive_sum(own, sums);
  for (int bin = begin; bin < end; ++bin) {
    base[bin] = first + counts[static_cast<int64_t>(bin) * pass.blocks + blockIdx.x];
    if (offsets && blockIdx.x == 0) offsets[bin] = first;
    first += totals[bin];
  }
  for (int i = thread; i < kWarps * pass.bins; i += kThreads) place[i] = 0;
  __syncthreads();

  // Each warp has a run of kWarp * kSteps rows: it counts its digits, then the warps before it are added.
  uint16_t* counter = place + warp * pass.bins;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile + warp * (kWarp * kSteps) + lane;
  for (int step = 0; step < kSteps; ++step) {
    Index pixel;
    bool stray;
    const uint32_t digit = pass.pixel(row + step * kWarp, &pixel) ? pass.digit(pixel, &stray) : kNoDigit;
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    if (digit != kNoDigit && __ffs(static_cast<int>(peers)) == lane + 1) {
      counter[digit] = static_cast<uint16_t>(counter[digit] + __popc(peers));
    }
    digits[step * kThreads + thread] = static_cast<uint16_t>(digit);
    __syncwarp();
  }
  __syncthreads();
  for (int bin = thread; bin < pass.bins; bin += kThreads) {
    int before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = place[w * pass.bins + bin];
      place[w * pass.bins + bin] = static_cast<uint16_t>(before);
      before += count;
    }
  }
  __syncthreads();
  for (int step = 0; step < kSteps; ++step) {
    Index pixel;
    const bool exists = pass.pixel(row + step * kWarp, &pixel);
    const uint32_t digit = digits[step * kThreads + thread];
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    const int before = __popc(peers & ((1u << lane) - 1));
    if (exists) to[base[digit] + counter[digit] + before] = pixel;
    __syncwarp();
    if (exists && before == 0) counter[digit] = static_cast<uint16_t>(counter[digit] + __popc(peers));
    __syncwarp();
  }
}

// Of sorted rows: offsets [num_segments + 1] <- first row whose segment is not below each number.
template <class Index>
__global__ void __launch_bounds__(kThreads) offsets_kernel(Pass<Index> sorted, int64_t num_segments, Index* offsets) {
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (segment > num_segments) return;
  int64_t low = 0, count = sorted.n;
  while (count > 0) {
    const int64_t half = count / 2;
    bool stray;
    if (sorted.segments.of(sorted.from[low + half], &stray) < segment) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  offsets[segment] = static_cast<Index>(low);
}

template <class Index>
__global__ void __launch_bounds__(kThreads) intervals_kernel(const Index* offsets, int64_t num_regions,
                                                             int64_t num_classes, int background_first, int64_t n,
                                                             Bounds<Index> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_regions) {
    const Index* own = offsets + i * num_classes;
    to.anchor_start[i] = own[background_first];
    to.key_start[i] = own[0];
    to.anchor_end[i] = to.key_end[i] = own[num_classes];
  }
  if (i >= n) return;
  const int64_t count = num_regions * num_classes + 1, bound = upper_bound(offsets, count, i);
  const bool inside = bound > 0 && bound < count;
  to.pos_start[i] = inside ? offsets[bound - 1] : 0;
  to.pos_end[i] = inside ? offsets[bound] : 0;
  to.self_pos[i] = static_cast<Index>(i);
}

template <class Index>
struct PairCounts {
  Index positives, negatives;
};

template <class Index>
__device__ PairCounts<Index> pair_counts(const Bounds<const Index>& pairs, int64_t num_regions, int64_t row) {
  const int64_t region = upper_bound(pairs.anchor_end, num_regions, row);
  if (region >= num_regions || pairs.anchor_start[region] > row) return {0, 0};
  const Index self = pairs.self_pos[row], start = pairs.pos_start[row], end = pairs.pos_end[row];
  const Index first = pairs.key_start[region], last = pairs.key_end[region];
  const Index same = end - start - (self >= start && self < end);
  return {same, last - first - (self >= first && self < last) - same};
}

template <class Index>
__global__ void __launch_bounds__(kThreads) counts_kernel(Bounds<const Index> pairs, int64_t num_regions, int64_t n,
                                                          Index* positives, Index* negatives) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const PairCounts<Index> counts = pair_counts(pairs, num_regions, i);
  positives[i] = counts.positives;
  negatives[i] = counts.negatives;
}

template <class Index>
__global__ void __launch_bounds__(kThreads) counted_kernel(Bounds<const Index> pairs, int64_t num_regions, int64_t n,
                                                           int need_negatives, uint8_t* counted) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const PairCounts<Index> counts = pair_counts(pairs, num_regions, i);
  counted[i] = counts.positives > 0 && (!need_negatives || counts.negatives > 0);
}

// One pass from order to order; `offsets` and `outside` only where they are wanted of it.
template <class Index>
cudaError_t sort_pass(const Pass<Index>& pass, Index* counts, Index* totals, Index* to, Index* offsets,
                      int64_t* outside, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(pass.blocks), bins = static_cast<unsigned>(pass.bins);
  cudaError_t error = launch(count_kernel<Index>, blocks, kThreads, (bins + 1) * sizeof(uint32_t), stream, pass, counts);
  if (error != cudaSuccess) return error;
  error = launch(sum_kernel<Index>, bins + 1, kThreads, 2 * kWarps * sizeof(Index), stream, counts, totals, pass.bins,
                 pass.blocks, outside);
  if (error != cudaSuccess) return error;
  const size_t shared = (2 * kWarps + bins) * sizeof(Index) + (kWarps * bins + kTile) * sizeof(uint16_t);
  return launch(place_kernel<Index>, blocks, kThreads, shared, stream, pass, static_cast<const Index*>(counts),
                static_cast<const Index*>(totals), to, offsets);
}

int passes_for(int64_t num_segments) {
  int passes = 1;
  while (num_segments >> (passes * kDigitBits)) ++passes;
  return passes;
}

struct Layout {
  int64_t counts, totals, order, bytes;  // where each array begins
};

Layout layout(int64_t n, int64_t num_segments, int64_t index_bytes) {
  const int passes = passes_for(num_segments);
  const int64_t bins = passes > 1 ? kMaxBins : num_segments + 1;
  Layout at{};
  at.totals = aligned((bins + 1) * blocks_for(n, kTile) * index_bytes);
  at.order = at.totals + aligned(bins * index_bytes);
  at.bytes = at.order + (passes > 1 ? aligned(n * index_bytes) : 0);
  return at;
}

template <class Index>
cudaError_t class_sort(const Segments& segments, int64_t n, int64_t num_segments, Index* order, Index* offsets,
                       int64_t* outside, unsigned char* workspace, cudaStream_t stream) {
  const Layout at = layout(n, num_segments, sizeof(Index));
  Index* counts = reinterpret_cast<Index*>(workspace + at.counts);
  Index* totals = reinterpret_cast<Index*>(workspace + at.totals);
  Index* other = reinterpret_cast<Index*>(workspace + at.order);
  const int passes = passes_for(num_segments);
  Pass<Index> pass{segments, nullptr, n, 0, 0, static_cast<int>(blocks_for(n, kTile))};
  for (int i = 0; i < passes; ++i) {
    const bool last = i == passes - 1;
    pass.shift = i * kDigitBits;
    pass.bins = last ? static_cast<int>(num_segments >> pass.shift) + 1 : kMaxBins;
    Index* to = (passes - 1 - i) % 2 ? other : order;
    const cudaError_t error = sort_pass(pass, counts, totals, to, passes == 1 ? offsets : nullptr,
                                        i == 0 ? outside : nullptr, stream);
    if (error != cudaSuccess) return error;
    pass.from = to;
  }
  if (passes == 1) return cudaSuccess;
  return launch(offsets_kernel<Index>, static_cast<unsigned>(blocks_for(num_segments + 1, kThreads)), kThreads, 0,
                stream, pass, num_segments, offsets);
}

template <class Index>
cudaError_t load_all() {
  return load(count_kernel<Index>, sum_kernel<Index>, place_kernel<Index>, offsets_kernel<Index>,
              intervals_kernel<Index>, counts_kernel<Index>, counted_kernel<Index>);
}

}  // namespace

cudaError_t probe_partition() {
  const cudaError_t error = load_all<int32_t>();
  return error == cudaSuccess ? load_all<int64_t>() : error;
}

}  // namespace hpcloss

int64_t hpcloss_cuda_class_sort_bytes(int64_t n, int64_t num_segments, int32_t index_type) {
  if (n < 0 || num_segments < 1) return 0;
  return hpcloss::layout(n, num_segments, index_type == HPCLOSS_INT32 ? 4 : 8).bytes;
}

int32_t hpcloss_cuda_class_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                int64_t num_regions, int64_t first_class, int64_t num_classes, int64_t background,
                                const int64_t* ignore, int64_t num_ignore, void* order, void* offsets,
                                int32_t index_type, int64_t* outside, void* workspace, int64_t bytes, void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_class_sort(labels, label_type, n, regions, num_regions, num_classes, ignore,
                                             num_ignore, order, offsets, index_type, outside)) {
    return error;
  }
  if (n < 1) return HPCLOSS_ERROR_SIZE;
  if (!workspace) return HPCLOSS_ERROR_NULL;
  const int64_t num_segments = num_regions * num_classes;
  if (bytes < hpcloss_cuda_class_sort_bytes(n, num_segments, index_type)) return HPCLOSS_ERROR_WORKSPACE;
  const Segments segments{pixels(labels, label_type, *regions, num_regions, ignore, num_ignore), first_class, num_classes,
                          background};
  const auto run = [&](auto index) {
    using Index = decltype(index);
    return class_sort(segments, n, num_segments, static_cast<Index*>(order), static_cast<Index*>(offsets), outside,
                      static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream));
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}

int32_t hpcloss_cuda_class_intervals(const void* offsets, int64_t num_regions, int64_t num_classes,
                                     int32_t background_first, int64_t n, int32_t index_type, void* pos_start,
                                     void* pos_end, void* self_pos, void* anchor_start, void* anchor_end,
                                     void* key_start, void* key_end, void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_class_intervals(offsets, num_regions, num_classes, n, index_type, pos_start, pos_end,
                                                  self_pos, anchor_start, anchor_end, key_start, key_end)) {
    return error;
  }
  const auto blocks = static_cast<unsigned>(blocks_for(n > num_regions ? n : num_regions, kThreads));
  const auto run = [&](auto index) {
    using Index = decltype(index);
    const Bounds<Index> to{static_cast<Index*>(pos_start),    static_cast<Index*>(pos_end),
                           static_cast<Index*>(self_pos),     static_cast<Index*>(anchor_start),
                           static_cast<Index*>(anchor_end),   static_cast<Index*>(key_start),
                           static_cast<Index*>(key_end)};
    return launch(intervals_kernel<Index>, blocks, kThreads, 0, static_cast<cudaStream_t>(stream),
                  static_cast<const Index*>(offsets), num_regions, num_classes, background_first ? 1 : 0, n, to);
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}

int32_t hpcloss_cuda_pair_counts(const void* pos_start, const void* pos_end, const void* self_pos,
                                 const void* anchor_start, const void* anchor_end, const void* key_start,
                                 const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                 void* positives, void* negatives, void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_pair_counts(pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start,
                                              key_end, n, num_regions, index_type, positives, negatives)) {
    return error;
  }
  if (!n) return HPCLOSS_OK;
  const auto run = [&](auto index) {
    using Index = decltype(index);
    using In = const Index*;
    const Bounds<const Index> pairs{static_cast<In>(pos_start),  static_cast<In>(pos_end),
                                    static_cast<In>(self_pos),   static_cast<In>(anchor_start),
                                    static_cast<In>(anchor_end), static_cast<In>(key_start),
                                    static_cast<In>(key_end)};
    return launch(counts_kernel<Index>, static_cast<unsigned>(blocks_for(n, kThreads)), kThreads, 0,
                  static_cast<cudaStream_t>(stream), pairs, num_regions, n, static_cast<Index*>(positives),
                  static_cast<Index*>(negatives));
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}

int32_t hpcloss_cuda_pair_counted(const void* pos_start, const void* pos_end, const void* self_pos,
                                  const void* anchor_start, const void* anchor_end, const void* key_start,
                                  const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                  int32_t need_negatives, uint8_t* counted, void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_pair_counts(pos_start, pos_end, self_pos, anchor_start, anchor_end, key_start,
                                              key_end, n, num_regions, index_type, counted, counted)) {
    return error;
  }
  if (!n) return HPCLOSS_OK;
  const auto run = [&](auto index) {
    using Index = decltype(index);
    using In = const Index*;
    const Bounds<const Index> pairs{static_cast<In>(pos_start),  static_cast<In>(pos_end),
                                    static_cast<In>(self_pos),   static_cast<In>(anchor_start),
                                    static_cast<In>(anchor_end), static_cast<In>(key_start),
                                    static_cast<In>(key_end)};
    return launch(counted_kernel<Index>, static_cast<unsigned>(blocks_for(n, kThreads)), kThreads, 0,
                  static_cast<cudaStream_t>(stream), pairs, num_regions, n, need_negatives, counted);
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}
