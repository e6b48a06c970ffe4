// What the CUDA sources share: launches, dynamic shared memory, errors.
//
// Kernels are launched through `launch` and get dynamic shared memory from `dynamic_shared`, so that tests can compile
// the same sources for a CPU (tests/tools/cuda_on_cpu.h).
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

// Load the kernels of a source for the current device.
using Probe = cudaError_t (*)();
cudaError_t probe_partition();
cudaError_t probe_label_sort();
cudaError_t probe_sample();

template <class Kernel, class... Kernels>
cudaError_t load(Kernel kernel, Kernels... kernels) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if constexpr (sizeof...(kernels) > 0) {
    if (error == cudaSuccess) return load(kernels...);
  }
  return error;
}

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

// Values [count] <- their exclusive sums, by one block; returns the total. `sums` as above.
template <class Value>
__device__ Value exclusive_sums(Value* values, int64_t count, Value* sums) {
  constexpr int kEach = 8;  // values of a thread: fewer rounds, each of which waits for memory
  Value total = 0;
  for (int64_t base = 0; base < count; base += static_cast<int64_t>(blockDim.x) * kEach) {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kEach;
    Value own[kEach], sum = 0;
    for (int i = 0; i < kEach; ++i) {
      own[i] = first + i < count ? values[first + i] : 0;
      sum += own[i];
    }
    Value before = total + exclusive_sum(sum, sums);
    for (int i = 0; i < kEach; ++i) {
      if (first + i < count) values[first + i] = before;
      before += own[i];
    }
    total += sums[blockDim.x / kWarp];
    __syncthreads();
  }
  return total;
}

}  // namespace hpcloss
