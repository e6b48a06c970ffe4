// The elements of each interval with the smallest (key, position), and positives of anchors; on a CUDA device.
//
// A block streams a part of an interval through a buffer in shared memory: elements below the smallest limit known so
// far are appended, a full buffer is sorted and cut to k. Keys are made once and kept nowhere else. Long intervals have
// several parts, cut at multiples of a number of rows, and a second kernel joins what the parts found. Which slot of the
// buffer an element gets depends on the order in which threads arrive; what is chosen does not, as no two elements are
// equal.

#include "checks.h"
#include "cuda.h"
#include "philox.h"

namespace hpcloss {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 4, kStride = kThreads * kSteps;  // elements of a block between two looks at the buffer
constexpr int64_t kMaxSamples = 4096;
constexpr int kMaxBuffer = 6000;      // entries; room for kMaxSamples and more than a stride
constexpr int kMinPartBits = 13;      // so many rows are worth a block
constexpr int64_t kMostParts = 1000;  // of all rows: a stride reaches each
constexpr int kHead = 128;            // bytes of shared memory before the buffer

// An element by key, then position in its interval: the order in which elements are chosen.
using Entry = unsigned long long;

// Shared memory: entries [first, count) are those of the stream at hand.
struct Buffer {
  Entry* entries;
  int* count;
  Entry* limit;

  __device__ static Buffer in_shared() {
    unsigned char* bytes = dynamic_shared();
    return {reinterpret_cast<Entry*>(bytes + kHead), reinterpret_cast<int*>(bytes), reinterpret_cast<Entry*>(bytes + 8)};
  }
};

// Sorts `count` entries with the threads of a block; a barrier must come before, and one is the last thing done. A
// bitonic sort that only ever moves small values down, so that nothing needs to stand behind the last entry.
__device__ void sort(Entry* entries, int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < padded / 2; pair += kThreads) {
        const int offset = pair & (stride - 1), group = 2 * (pair - offset), low = group + offset;
        // The first step of each size compares with the mirror image.
        const int high = stride == size / 2 ? group + 2 * stride - 1 - offset : low + stride;
        if (high < count && entries[low] > entries[high]) {
          const Entry larger = entries[low];
          entries[low] = entries[high];
          entries[high] = larger;
        }
      }
      __syncthreads();
    }
  }
}

// Leaves in the buffer, from `first` on and sorted, the `keep` smallest of the entries that source(i, limit) gives for
// i in [0, size); it says false for none. Returns how many there are. All threads call it and get the same. kAscending:
// once a stride brings nothing below the limit, nothing behind it does.
template <bool kAscending, class Source>
__device__ int smallest(const Buffer& buffer, int first, int capacity, int keep, int64_t size, const Source& source) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (threadIdx.x == 0) {
    *buffer.count = first;
    *buffer.limit = ~Entry{0};
  }
  __syncthreads();
  bool more = size > 0;
  for (int64_t base = 0; more; base += kStride) {
    const Entry limit = *buffer.limit;
    bool any = false;
    for (int step = 0; step < kSteps; ++step) {
      const int64_t i = base + step * kThreads + threadIdx.x;
      Entry entry = 0;
      const bool taken = i < size && source(i, limit, &entry) && entry < limit;
      const unsigned takers = __ballot_sync(kAllLanes, taken);
      int slot = 0;
      if (lane == 0 && takers) slot = atomicAdd(buffer.count, __popc(takers));
      slot = __shfl_sync(kAllLanes, slot, 0) + __popc(takers & ((1u << lane) - 1));
      if (taken) buffer.entries[slot] = entry;
      any |= taken;
    }
    more = base + kStride < size;
    if (kAscending) {
      more = __syncthreads_or(any) && more;
    } else {
      __syncthreads();
    }
    const int count = *buffer.count;
    __syncthreads();
    if (count + kStride <= capacity && more) continue;
    sort(buffer.entries + first, count - first);
    if (threadIdx.x == 0 && count - first >= keep) {
      *buffer.count = first + keep;
      if (keep) *buffer.limit = buffer.entries[first + keep - 1];
    }
    __syncthreads();
  }
  const int found = *buffer.count - first;
  __syncthreads();
  return found;
}

// What is sampled, by value in every kernel. An interval of hard-easy is two streams, the wrong elements and the right.
template <class Index>
struct Sampling {
  const Index *order, *offsets;
  int64_t n, num_intervals, k;
  int32_t kind;
  const void* values;
  int64_t num_pixels;
  const int64_t* seed;
  int part_bits;            // a part has 2^part_bits rows
  int64_t num_parts;        // at most, of a stream
  int capacity;
  Entry* found;       // [streams, num_parts, k] smallest entries of each part
  int* num_found;     // [streams, num_parts]
  Index* slots;       // [num_intervals, k] chosen pixels
  Index* num_chosen;  // [num_intervals]

  __host__ __device__ int streams() const { return kind == HPCLOSS_HARD_EASY ? 2 : 1; }

  // Rows of an interval; offsets that make no sense give none outside [0, n).
  __device__ int64_t begin(int64_t interval) const { return bound(offsets[interval]); }
  __device__ int64_t end(int64_t interval) const { return bound(offsets[interval + 1]); }

  // Parts are cut where rows are multiples of 2^part_bits; those of an interval follow those of the intervals before it, one
  // more than there are cuts inside.
  __device__ int64_t first_part(int64_t interval) const { return interval + (begin(interval) >> part_bits); }

  // The entry of a row at `position` of its interval, if it is present in the stream and may be below the limit.
  __device__ bool entry(int64_t row, int64_t position, bool hard, uint64_t own_seed, Entry limit, Entry* entry) const {
    const uint64_t pixel = static_cast<uint64_t>(order[row]);
    if (pixel >= static_cast<uint64_t>(num_pixels)) return false;
    uint32_t key = 0;
    if (kind == HPCLOSS_HARDEST) {
      key = hardest_key(static_cast<const float*>(values)[pixel]);
    } else if (kind == HPCLOSS_WEIGHTED) {
      const float weight = static_cast<const float*>(values)[pixel];
      if (!(weight > 0)) return false;
      const uint32_t word = pixel_word(pixel, own_seed);
      if (loses_race(word, weight, static_cast<uint32_t>(limit >> 32))) return false;
      key = weighted_key(word, weight);
    } else {
      if (kind == HPCLOSS_HARD_EASY && (static_cast<const uint8_t*>(values)[pixel] != 0) != hard) return false;
      key = pixel_word(pixel, own_seed);
    }
    *entry = static_cast<Entry>(key) << 32 | static_cast<Entry>(position);
    return true;
  }

 private:
  __device__ int64_t bound(int64_t offset) const { return offset < 0 ? 0 : offset > n ? n : offset; }
};

// A block for each part of each stream; the last ones may have no interval.
template <class Index>
__global__ void __launch_bounds__(kThreads) select_kernel(Sampling<Index> sampling) {
  const Buffer buffer = Buffer::in_shared();
  const bool hard = blockIdx.x < sampling.num_parts;  // the first stream
  const int64_t part = blockIdx.x - (hard ? 0 : sampling.num_parts);
  int64_t interval = 0, behind = sampling.num_intervals;  // the last one whose first part is not behind this one
  while (behind - interval > 1) {
    const int64_t middle = interval + (behind - interval) / 2;
    (sampling.first_part(middle) <= part ? interval : behind) = middle;
  }
  const int64_t begin = sampling.begin(interval), end = sampling.end(interval);
  const int64_t first = (part - interval) << sampling.part_bits, size = int64_t{1} << sampling.part_bits;
  const int64_t from = first > begin ? first : begin, limit = first + size, to = limit < end ? limit : end;
  const uint64_t seed = static_cast<uint64_t>(*sampling.seed);
  const int keep = static_cast<int>(sampling.k);
  const int count =
      smallest<false>(buffer, 0, sampling.capacity, keep, to - from, [&](int64_t i, Entry below, Entry* entry) {
        return sampling.entry(from + i, from + i - begin, hard, seed, below, entry);
      });
  Entry* found = sampling.found + static_cast<int64_t>(blockIdx.x) * sampling.k;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) found[i] = buffer.entries[i];
  if (threadIdx.x == 0) sampling.num_found[blockIdx.x] = count;
}

// A block for each interval: joins its parts and writes the pixels chosen, by ascending position. Two blocks at a time:
// shared memory seldom has room for more, and for more the compiler would spill registers.
template <class Index>
__global__ void __launch_bounds__(kThreads, 2) join_kernel(Sampling<Index> sampling) {
  const Buffer buffer = Buffer::in_shared();
  const int64_t interval = blockIdx.x, k = sampling.k, first = sampling.first_part(interval);
  const int streams = sampling.streams();
  const int64_t last = (sampling.end(interval) >> sampling.part_bits) + interval;
  const int parts = last >= first ? static_cast<int>(last - first) + 1 : 0;
  // Of more than k elements of a stream only k were found, and more are never taken: quotas come out the same.
  const auto present = [&](int stream) {
    int64_t sum = 0;
    for (int part = 0; part < parts; ++part) sum += sampling.num_found[stream * sampling.num_parts + first + part];
    return sum < k ? sum : k;
  };
  int64_t take_hard = present(0), take_easy = 0;  // one stream: all are called hard
  if (streams == 2) {
    const int64_t easy = present(1), at_least = k - easy > k / 2 ? k - easy : k / 2;
    take_hard = take_hard < at_least ? take_hard : at_least;
    take_easy = easy < k - take_hard ? easy : k - take_hard;
  }
  int count = 0;
  for (int stream = 0; stream < streams; ++stream) {
    const int64_t take = stream ? take_easy : take_hard;
    if (!take) continue;
    const int64_t lists = stream * sampling.num_parts + first;
    // Rank by rank, the best of every part first.
    count += smallest<true>(buffer, count, sampling.capacity, static_cast<int>(take), parts * k,
                            [&](int64_t i, Entry, Entry* entry) {
                              const unsigned rank = static_cast<unsigned>(i) / static_cast<unsigned>(parts);
                              const unsigned list = static_cast<unsigned>(i) - rank * static_cast<unsigned>(parts);
                              if (rank >= static_cast<unsigned>(sampling.num_found[lists + list])) return false;
                              *entry = sampling.found[(lists + list) * k + rank];
                              return true;
                            });
  }
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) buffer.entries[i] &= 0xFFFFFFFFu;
  __syncthreads();
  sort(buffer.entries, count);
  const int64_t begin = sampling.begin(interval);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    sampling.slots[interval * k + i] = sampling.order[begin + static_cast<int64_t>(buffer.entries[i])];
  }
  if (threadIdx.x == 0) sampling.num_chosen[interval] = static_cast<Index>(count);
}

// One block: offsets [count + 1] <- exclusive sums of the counts, which become them too.
template <class Index>
__global__ void __launch_bounds__(kThreads) offsets_kernel(Index* counts, int64_t count, Index* offsets) {
  const Index total = exclusive_sums(counts, count, reinterpret_cast<Index*>(dynamic_shared()));
  for (int64_t i = threadIdx.x; i < count; i += kThreads) offsets[i] = counts[i];
  if (threadIdx.x == 0) offsets[count] = total;
}

// Closes the gaps between the intervals' slots; 0 behind the last.
template <class Index>
__global__ void __launch_bounds__(kThreads) compact_kernel(const Index* slots, const Index* offsets,
                                                           int64_t num_intervals, int64_t k, Index* chosen) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_intervals * k) return;
  const int64_t interval = upper_bound(offsets, num_intervals + 1, i) - 1;
  chosen[i] = interval < num_intervals ? slots[interval * k + i - offsets[interval]] : 0;
}

// Floyd's algorithm, a thread for each anchor: of the candidates 0 ... last - 1 take a draw below last, or the last one
// if it was taken before.
template <class Index>
__global__ void __launch_bounds__(kThreads) positives_kernel(const Index* pos_start, const Index* pos_end,
                                                             const Index* self_pos, int64_t n, int64_t k,
                                                             const int64_t* seed, Index* rows) {
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (anchor >= n) return;
  const int64_t first = pos_start[anchor], end = pos_end[anchor], own = self_pos[anchor];
  const bool has_self = own >= first && own < end;
  // As unsigned numbers, for any bounds; more than 2^32 candidates are beyond the definition.
  const uint64_t length = end > first ? static_cast<uint64_t>(end) - static_cast<uint64_t>(first) - has_self : 0;
  const int64_t candidates = length < (uint64_t{1} << 32) ? static_cast<int64_t>(length) : int64_t{1} << 32;
  const int64_t take = candidates < k ? candidates : k;
  Index* taken = rows + anchor * k;
  Words words{};
  for (int64_t draw = 0; draw < take; ++draw) {
    if (draw % 4 == 0) {
      words = philox(static_cast<uint64_t>(anchor), static_cast<uint32_t>(draw >> 2), kPositives,
                     static_cast<uint64_t>(*seed));
    }
    const uint32_t word = draw & 2 ? (draw & 1 ? words.word[3] : words.word[2])
                                   : (draw & 1 ? words.word[1] : words.word[0]);
    const int64_t last = candidates - take + draw;
    const Index t = static_cast<Index>((word * (static_cast<uint64_t>(last) + 1)) >> 32);
    // Ascending as they are: move what is larger up by one, unless t is there.
    int64_t place = draw;
    while (place > 0 && taken[place - 1] > t) --place;
    if (place > 0 && taken[place - 1] == t) {
      taken[draw] = static_cast<Index>(last);  // above all that came before
    } else {
      for (int64_t i = draw; i > place; --i) taken[i] = taken[i - 1];
      taken[place] = t;
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    const int64_t row = i < take ? first + taken[i] : -1;
    taken[i] = static_cast<Index>(i < take && has_self && row >= own ? row + 1 : row);
  }
}

struct Layout {
  int part_bits;
  int64_t num_parts, found, num_found, slots, num_chosen, bytes;  // where each array begins
};

Layout layout(int64_t n, int64_t num_intervals, int64_t k, int32_t kind, int64_t index_bytes) {
  const int64_t streams = kind == HPCLOSS_HARD_EASY ? 2 : 1;
  Layout at{};
  at.part_bits = kMinPartBits;
  while (n >> at.part_bits > kMostParts || 4 * k >> at.part_bits) ++at.part_bits;
  at.num_parts = num_intervals + (n >> at.part_bits);
  at.num_found = aligned(streams * at.num_parts * k * static_cast<int64_t>(sizeof(Entry)));
  at.slots = at.num_found + aligned(streams * at.num_parts * static_cast<int64_t>(sizeof(int)));
  at.num_chosen = at.slots + aligned(num_intervals * k * index_bytes);
  at.bytes = at.num_chosen + aligned(num_intervals * index_bytes);
  return at;
}

int capacity_for(int64_t k) {
  // Room for two strides beyond k, or a cut would leave none for the next.
  const int64_t wanted = k + 2 * kStride + kStride / 2;
  return static_cast<int>(wanted > kMaxBuffer ? kMaxBuffer : wanted);
}

template <class Index>
cudaError_t sample(Sampling<Index> sampling, Index* chosen, Index* chosen_offsets, unsigned char* workspace,
                   cudaStream_t stream) {
  const int64_t intervals = sampling.num_intervals, k = sampling.k;
  const Layout at = layout(sampling.n, intervals, k, sampling.kind, sizeof(Index));
  sampling.part_bits = at.part_bits;
  sampling.num_parts = at.num_parts;
  sampling.capacity = capacity_for(k);
  sampling.found = reinterpret_cast<Entry*>(workspace + at.found);
  sampling.num_found = reinterpret_cast<int*>(workspace + at.num_found);
  sampling.slots = reinterpret_cast<Index*>(workspace + at.slots);
  sampling.num_chosen = reinterpret_cast<Index*>(workspace + at.num_chosen);
  const size_t shared = kHead + static_cast<size_t>(sampling.capacity) * sizeof(Entry);
  cudaError_t error = cudaSuccess;
  if (intervals) {
    const int64_t blocks = sampling.streams() * at.num_parts;
    error = launch(select_kernel<Index>, static_cast<unsigned>(blocks), kThreads, shared, stream, sampling);
    if (error != cudaSuccess) return error;
    error = launch(join_kernel<Index>, static_cast<unsigned>(intervals), kThreads, shared, stream, sampling);
    if (error != cudaSuccess) return error;
  }
  error = launch(offsets_kernel<Index>, 1, kThreads, kHead, stream, sampling.num_chosen, intervals, chosen_offsets);
  if (error != cudaSuccess || !intervals) return error;
  return launch(compact_kernel<Index>, static_cast<unsigned>(blocks_for(intervals * k, kThreads)), kThreads, 0, stream,
                static_cast<const Index*>(sampling.slots), static_cast<const Index*>(chosen_offsets), intervals, k,
                chosen);
}

template <class Index>
cudaError_t load_all() {
  return load(select_kernel<Index>, join_kernel<Index>, offsets_kernel<Index>, compact_kernel<Index>,
              positives_kernel<Index>);
}

}  // namespace

cudaError_t probe_sample() {
  const cudaError_t error = load_all<int32_t>();
  return error == cudaSuccess ? load_all<int64_t>() : error;
}

}  // namespace hpcloss

int64_t hpcloss_cuda_sample_bytes(int64_t n, int64_t num_intervals, int64_t k, int32_t kind, int32_t index_type) {
  if (n < 0 || num_intervals < 0 || k < 1) return 0;
  return hpcloss::layout(n, num_intervals, k, kind, index_type == HPCLOSS_INT32 ? 4 : 8).bytes;
}

int32_t hpcloss_cuda_sample(const void* order, const void* offsets, int32_t index_type, int64_t n,
                            int64_t num_intervals, int64_t k, int32_t kind, const void* values, int64_t num_pixels,
                            const int64_t* seed, void* chosen, void* chosen_offsets, void* workspace, int64_t bytes,
                            void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_sample(order, offsets, index_type, n, num_intervals, k, kMaxSamples, kind, values,
                                         num_pixels, seed, chosen, chosen_offsets)) {
    return error;
  }
  if (!workspace) return HPCLOSS_ERROR_NULL;
  if (num_intervals > kMaxIndex32 / 4) return HPCLOSS_ERROR_SIZE;  // blocks of a launch
  if (bytes < hpcloss_cuda_sample_bytes(n, num_intervals, k, kind, index_type)) return HPCLOSS_ERROR_WORKSPACE;
  const auto run = [&](auto index) {
    using Index = decltype(index);
    Sampling<Index> sampling{};
    sampling.order = static_cast<const Index*>(order);
    sampling.offsets = static_cast<const Index*>(offsets);
    sampling.n = n;
    sampling.num_intervals = num_intervals;
    sampling.k = k;
    sampling.kind = kind;
    sampling.values = values;
    sampling.num_pixels = num_pixels;
    sampling.seed = seed;
    return sample(sampling, static_cast<Index*>(chosen), static_cast<Index*>(chosen_offsets),
                  static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream));
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}

int32_t hpcloss_cuda_sample_positives(const void* pos_start, const void* pos_end, const void* self_pos,
                                      int32_t index_type, int64_t n, int64_t k, const int64_t* seed, void* rows,
                                      void* stream) {
  using namespace hpcloss;
  if (const int32_t error = check_sample_positives(pos_start, pos_end, self_pos, index_type, n, k, seed, rows)) {
    return error;
  }
  if (!n) return HPCLOSS_OK;
  const auto run = [&](auto index) {
    using Index = decltype(index);
    return launch(positives_kernel<Index>, static_cast<unsigned>(blocks_for(n, kThreads)), kThreads, 0,
                  static_cast<cudaStream_t>(stream), static_cast<const Index*>(pos_start),
                  static_cast<const Index*>(pos_end), static_cast<const Index*>(self_pos), n, k, seed,
                  static_cast<Index*>(rows));
  };
  return report(index_type == HPCLOSS_INT32 ? run(int32_t{}) : run(int64_t{}));
}
