// What the CUDA sources share: launches, dynamic shared memory, errors.
//
// Kernels are launched through `launch` and get dynamic shared memory from `dynamic_shared`, so that tests can compile
// the same sources for a CPU (tests/cuda_on_cpu.h).
#pragma once

#include <stdint.h>

#include "hpcloss.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace hpcloss {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace hpcloss
#endif

namespace hpcloss {

// Remembers a failure for hpcloss_cuda_error and makes it an error code.
int32_t report(cudaError_t error);

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }
inline int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Index of the first of `count` ascending values that is greater than `value`.
template <class Index>
__device__ int64_t upper_bound(const Index* values, int64_t count, int64_t value) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (values[low + half] <= value) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// Exclusive prefix sum of one value of each thread of a block; `sums` has room for a value of each warp and one more,
// which is the total afterwards. All threads call it, and a barrier must come before `sums` is written again.
template <class Value>
__device__ Value exclusive_sum(Value value, Value* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  Value inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const Value before = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(step));
    if (lane >= step) inclusive += before;
  }
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  if (threadIdx.x == 0) {
    Value total = 0;
    for (int w = 0; w < warps; ++w) {
      const Value own = sums[w];
      sums[w] = total;
      total += own;
    }
    sums[warps] = total;
  }
  __syncthreads();
  return sums[warp] + inclusive - value;
}

}  // namespace hpcloss
