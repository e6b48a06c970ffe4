// Stable sort by (region, label) for any labels, and the intervals it leaves behind; on a CUDA device.
//
// A merge sort of (part, label, pixel). It never asks how many labels there are or how far they are apart, so the host
// has to know nothing. All pixels differ, so there is one right order whatever threads do. Each block sorts some tiles
// in shared memory and merges them. Then each kernel merges runs in pairs. There are at most kMostRuns runs to begin
// with, and so at most eight such kernels for any number of pixels.

#include "checks.h"
#include "cuda.h"
#include "pixels.h"

namespace hpcloss {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8, kTile = kThreads * kEach;  // rows of a thread, of a block
constexpr int64_t kMostRuns = 256;
constexpr uint32_t kPadding = 0xFFFFFFFFu;  // the part of rows that fill up the last tile; behind all others

// A pixel and what it is sorted by. Part: 2 * region for the background, 2 * region + 1 for other labels, and
// 2 * num_regions for pixels that are ignored.
template <class Index>
struct Row {
  int64_t label;
  Index pixel;
  uint32_t part;
};

template <class Index>
__device__ bool before(const Row<Index>& a, const Row<Index>& b) {
  if (a.part != b.part) return a.part < b.part;
  if (a.label != b.label) return a.label < b.label;
  return a.pixel < b.pixel;
}

template <class Index>
__device__ bool same_class(const Row<Index>& a, const Row<Index>& b) {
  return a.part == b.part && a.label == b.label;
}

// What decides the place of a pixel, by value.
struct Sorted : Pixels {
  int64_t n, background;
  bool has_background;

  template <class Index>
  __device__ Row<Index> row(int64_t pixel) const {
    if (pixel >= n) return {0, 0, kPadding};
    const int64_t label = label_of(pixel), region = region_of(static_cast<Index>(pixel));
    if (region < 0 || is_ignored(label)) {
      return {0, static_cast<Index>(pixel), static_cast<uint32_t>(2 * num_regions)};
    }
    const bool behind = !has_background || label != background;
    return {label, static_cast<Index>(pixel), static_cast<uint32_t>(2 * region + behind)};
  }
};

// How many of the first `count` rows of two merged runs come from the first.
template <class Index>
__device__ int64_t share_of_first(const Row<Index>* first, int64_t size, const Row<Index>* second, int64_t other_size,
                                  int64_t count) {
  int64_t low = count > other_size ? count - other_size : 0, high = count < size ? count : size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (before(second[count - 1 - middle], first[middle])) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// own [kEach] <- rows `from` and following of two merged runs.
template <class Index>
__device__ void merge(const Row<Index>* first, int size, const Row<Index>* second, int other_size, int from,
                      Row<Index>* own) {
  int i = static_cast<int>(share_of_first(first, size, second, other_size, from)), j = from - i;
  for (int e = 0; e < kEach && i + j < size + other_size; ++e) {
    const bool take = j >= other_size || (i < size && before(first[i], second[j]));
    own[e] = take ? first[i++] : second[j++];
  }
}

template <class Index>
__device__ void sort_two(Row<Index>& a, Row<Index>& b) {
  const Row<Index> left = a, right = b;
  const bool swap = before(right, left);
  a = swap ? right : left;
  b = swap ? left : right;
}

// to: the rows of a tile in order, by the whole block.
template <class Index>
__device__ void sort_tile(const Sorted& sorted, int64_t tile, Row<Index>* shared, Row<Index>* to) {
  const int thread = static_cast<int>(threadIdx.x), place = thread * kEach;
  const int64_t begin = tile * kTile;
  __syncthreads();
  for (int i = thread; i < kTile; i += kThreads) shared[i] = sorted.template row<Index>(begin + i);
  __syncthreads();
  Row<Index> own[kEach];
  for (int e = 0; e < kEach; ++e) own[e] = shared[place + e];
  for (int round = 0; round < kEach; round += 2) {
    for (int e = 0; e + 1 < kEach; e += 2) sort_two(own[e], own[e + 1]);
    for (int e = 1; e + 1 < kEach; e += 2) sort_two(own[e], own[e + 1]);
  }
  for (int width = kEach; width < kTile; width *= 2) {
    __syncthreads();
    for (int e = 0; e < kEach; ++e) shared[place + e] = own[e];
    __syncthreads();
    const int pair = place / (2 * width) * (2 * width);
    merge(shared + pair, width, shared + pair + width, width, place - pair, own);
  }
  for (int e = 0; e < kEach; ++e) {
    if (begin + place + e < sorted.n) to[begin + place + e] = own[e];
  }
}

// to: a tile of rows of the merged pair of runs that it lies in, each `width` rows long, by the whole block.
template <class Index>
__device__ void merge_tile(const Row<Index>* rows, int64_t n, int64_t width, int64_t tile, Row<Index>* shared,
                           Row<Index>* to) {
  const int thread = static_cast<int>(threadIdx.x), place = thread * kEach;
  const int64_t begin = tile * kTile, pair = begin / (2 * width) * (2 * width);
  const int count = static_cast<int>(begin + kTile < n ? kTile : n - begin);
  const int64_t left = n - pair, size = left < width ? left : width;
  const int64_t other_size = left - size < width ? left - size : width;
  const Row<Index>*first = rows + pair, *second = first + size;
  // How much of the first run comes before the tile, and before its end: each warp searches for both at once.
  const int64_t share = share_of_first(first, size, second, other_size, begin - pair + (thread % 2 ? count : 0));
  const int64_t from_first = __shfl_sync(kAllLanes, share, 0), from_second = begin - pair - from_first;
  const int firsts = static_cast<int>(__shfl_sync(kAllLanes, share, 1) - from_first);
  __syncthreads();
  for (int i = thread; i < count; i += kThreads) {
    shared[i] = i < firsts ? first[from_first + i] : second[from_second + i - firsts];
  }
  __syncthreads();
  if (place >= count) return;
  Row<Index> own[kEach];
  merge(shared, firsts, shared + firsts, count - firsts, place, own);
  for (int e = 0; e < kEach; ++e) {
    if (place + e < count) to[begin + place + e] = own[e];
  }
}

// Each block sorts `tiles` tiles, a power of two, and merges them to one run. The run ends in `rows` if the two arrays
// change places an even number of times, else in `other`.
template <class Index>
__global__ void __launch_bounds__(kThreads) sort_kernel(Sorted sorted, int tiles, Row<Index>* rows, Row<Index>* other) {
  Row<Index>* shared = reinterpret_cast<Row<Index>*>(dynamic_shared());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tiles, most = (sorted.n + kTile - 1) / kTile;
  const int64_t end = first + tiles < most ? first + tiles : most;
  for (int64_t tile = first; tile < end; ++tile) sort_tile(sorted, tile, shared, rows);
  for (int64_t width = kTile; width < static_cast<int64_t>(tiles) * kTile; width *= 2) {
    __syncthreads();
    for (int64_t tile = first; tile < end; ++tile) merge_tile(rows, sorted.n, width, tile, shared, other);
    Row<Index>* merged = other;
    other = rows;
    rows = merged;
  }
}

template <class Index>
__global__ void __launch_bounds__(kThreads) merge_kernel(const Row<Index>* rows, int64_t n, int64_t width,
                                                         Row<Index>* to) {
  merge_tile(rows, n, width, blockIdx.x, reinterpret_cast<Row<Index>*>(dynamic_shared()), to);
}

// First row of the class of row i. The search begins at the row: most classes are short, or fill whole warps.
template <class Index>
__device__ int64_t class_start(const Row<Index>* rows, int64_t i) {
  int64_t reach = 1;
  while (reach <= i && same_class(rows[i - reach], rows[i])) reach *= 2;
  int64_t low = reach <= i ? i - reach + 1 : 0, high = i - reach / 2;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (same_class(rows[middle], rows[i])) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// One past the last row of the class of row i.
template <class Index>
__device__ int64_t class_end(const Row<Index>* rows, int64_t n, int64_t i) {
  int64_t reach = 1;
  while (i + reach < n && same_class(rows[i + reach], rows[i])) reach *= 2;
  int64_t low = i + reach / 2 + 1, high = i + reach < n ? i + reach : n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (same_class(rows[middle], rows[i])) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// First row whose part is not below `part`.
template <class Index>
__device__ Index part_start(const Row<Index>* rows, int64_t n, int64_t part) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(rows[middle].part) < part) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<Index>(low);
}

template <class Index>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const Row<Index>* rows, int64_t n, int64_t num_regions,
                                                          Index* order, Bounds<Index> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_regions) {
    to.key_start[i] = part_start(rows, n, 2 * i);
    to.anchor_start[i] = part_start(rows, n, 2 * i + 1);
    to.anchor_end[i] = to.key_end[i] = part_start(rows, n, 2 * i + 2);
  }
  if (i >= n) return;
  const bool alive = rows[i].part < 2 * num_regions;
  order[i] = rows[i].pixel;
  to.pos_start[i] = alive ? static_cast<Index>(class_start(rows, i)) : 0;
  to.pos_end[i] = alive ? static_cast<Index>(class_end(rows, n, i)) : 0;
  to.self_pos[i] = static_cast<Index>(i);
}

// Tiles of a block of sort_kernel.
int tiles_of_run(int64_t n) {
  int tiles = 1;
  while (blocks_for(n, static_cast<int64_t>(tiles) * kTile) > kMostRuns) tiles *= 2;
  return tiles;
}

template <class Index>
cudaError_t label_sort(const Sorted& sorted, Index* order, const Bounds<Index>& to, Row<Index>* rows,
                       cudaStream_t stream) {
  const int64_t n = sorted.n;
  const int tiles = tiles_of_run(n);
  const size_t shared = kTile * sizeof(Row<Index>);
  Row<Index>* other = rows + n;
  const auto change_places = [&] {
    Row<Index>* merged = other;
    other = rows;
    rows = merged;
  };
  int64_t width = static_cast<int64_t>(tiles) * kTile;
  cudaError_t error = launch(sort_kernel<Index>, static_cast<unsigned>(blocks_for(n, width)), kThreads, shared, stream,
                             sorted, tiles, rows, other);
  for (int merged = 1; merged < tiles; merged *= 2) change_places();
  for (; width < n && error == cudaSuccess; width *= 2) {
    error = launch(merge_kernel<Index>, static_cast<unsigned>(blocks_for(n, kTile)), kThreads, shared, stream,
                   static_cast<const Row<Index>*>(rows), n, width, other);
    change_places();
  }
  if (error != cudaSuccess) return error;
  const int64_t items = n > sorted.num_regions ? n : sorted.num_regions;
  return launch(bounds_kernel<Index>, static_cast<unsigned>(blocks_for(items, kThreads)), kThreads, 0, stream,
                static_cast<const Row<Index>*>(rows), n, sorted.num_regions, order, to);
}

template <class Index>
cudaError_t load_all() {
  return load(sort_kernel<Index>, merge_kernel<Index>, bounds_kernel<Index>);
}

}  // namespace

cudaError_t probe_label_sort() {
  const cudaError_t error = load_all<int32_t>();
  return error == cudaSuccess ? load_all<int64_t>() : error;
}

}  // namespace hpcloss

int64_t hpcloss_cuda_label_sort_bytes(int64_t n, int32_t index_type) {
  using namespace hpcloss;
  if (n < 0) return 0;
  const int64_t bytes = index_type == HPCLOSS_INT32 ? sizeof(Row<int32_t>) : sizeof(Row<int64_t>);
  return aligned(n * bytes * (n > kTile ? 2 : 1));
}

int32_t hpcloss_cuda_label_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                int64_t num_regions, const int64_t* background, const int64_t* ignore,
                                int64_t num_ignore, void* order, int32_t index_type, void* pos_start, void* pos_end,
                                void* self_pos, void* anchor_start, void* anchor_end, void* key_start, void* key_end,
                                void* workspace, int64_t bytes, void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_label_sort(labels, label_type, n, regions, num_regions, ignore, num_ignore, order,
                                             index_type, pos_start, pos_end, self_pos, anchor_start, anchor_end,
                                             key_start, key_end)) {
    return error;
  }
  if (n < 1) return HPCLOSS_ERROR_SIZE;
  if (!workspace) return HPCLOSS_ERROR_NULL;
  if (bytes < hpcloss_cuda_label_sort_bytes(n, index_type)) return HPCLOSS_ERROR_WORKSPACE;
  const Sorted sorted{pixels(labels, label_type, *regions, num_regions, ignore, num_ignore), n,
                      background ? *background : 0, background != nullptr};
  const auto run = [&](auto index) {
    using Index = decltype(index);
    const Bounds<Index> to{static_cast<Index*>(pos_start),    static_cast<Index*>(pos_end),
                           static_cast<Index*>(self_pos),     static_cast<Index*>(anchor_start),
                           static_cast<Index*>(anchor_end),   static_cast<Index*>(key_start),
                           static_cast<Index*>(key_end)};
    return label_sort(sorted, static_cast<Index*>(order), to, static_cast<Row<Index>*>(workspace),
                      static_cast<cudaStream_t>(stream));
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}
