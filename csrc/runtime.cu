// Versions and errors of the CUDA runtime that this library is linked with.

#include "cuda.h"

namespace hpcloss {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}  // namespace

int32_t report(cudaError_t error) {
  if (error == cudaSuccess) return HPCLOSS_OK;
  last_error = error;
  cudaGetLastError();  // or the next launch would report it again
  return HPCLOSS_ERROR_CUDA;
}

}  // namespace hpcloss

int32_t hpcloss_cuda_versions(int32_t* driver, int32_t* runtime) {
  if (!driver || !runtime) return HPCLOSS_ERROR_NULL;
  int version = 0;
  if (const int32_t error = hpcloss::report(cudaDriverGetVersion(&version))) return error;
  *driver = version;
  if (const int32_t error = hpcloss::report(cudaRuntimeGetVersion(&version))) return error;
  *runtime = version;
  return HPCLOSS_OK;
}

int32_t hpcloss_cuda_probe(void) {
  for (const hpcloss::Probe probe : {hpcloss::probe_partition, hpcloss::probe_label_sort, hpcloss::probe_sample}) {
    if (const int32_t error = hpcloss::report(probe())) return error;
  }
  return HPCLOSS_OK;
}

const char* hpcloss_cuda_error(void) { return cudaGetErrorString(hpcloss::last_error); }
