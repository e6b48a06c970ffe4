/* A stand-in for NVIDIA's driver, libcuda.so.1: as much of it as Triton asks to load and launch kernels, none of which runs.

   Launches are checked as a driver checks them, against the limits of a part, and against the alignment that a kernel was
   compiled to expect of its arguments. tests/tools/launch_path.py builds it and talks to the functions that begin with stand_in. */

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_SHARED = 49152, MOST_THREADS = 1024, MOST_PARAMETERS = 64 };

typedef struct {
    char name[128];
    int dynamic_shared, launches, parameters, alignments[MOST_PARAMETERS];
} Kernel;

static int capability, shared_limit;
static char said[512] = "no error";
static int nothing;  // stands for a context and for a module

static CUresult refuse(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(said, sizeof said, format, values);
    va_end(values);
    return CUDA_ERROR_INVALID_VALUE;
}

/* What the tests say and ask. */

void stand_in_be(int compute_capability, int most_shared_bytes) {
    capability = compute_capability;
    shared_limit = most_shared_bytes;
}

void stand_in_expect(CUfunction function, int parameters, const int *alignments) {
    Kernel *kernel = (Kernel *)function;
    if (parameters > MOST_PARAMETERS) abort();
    kernel->parameters = parameters;
    memcpy(kernel->alignments, alignments, parameters * sizeof(int));
}

int stand_in_launches(CUfunction function) { return ((Kernel *)function)->launches; }

/* The device, its context and its streams. */

CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)&nothing, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&nothing, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) { return *text = said, CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit + 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

/* Kernels. */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (memcmp(image, "\177ELF", 4)) return refuse("what is loaded is no machine code");
    return *module = (CUmodule)&nothing, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    Kernel *kernel = calloc(1, sizeof(Kernel));
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    kernel->dynamic_shared = DEFAULT_SHARED;
    return *function = (CUfunction)kernel, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0, CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return refuse("attribute %d is not known", attribute);
    if (value > shared_limit) return refuse("%d bytes of shared memory, of which there are %d", value, shared_limit);
    return ((Kernel *)function)->dynamic_shared = value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    Kernel *kernel = (Kernel *)function;
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > INT32_MAX ||
        config->gridDimY > 65535 || config->gridDimZ > 65535)
        return refuse("%s: a grid of %u x %u x %u programs", kernel->name, config->gridDimX, config->gridDimY, config->gridDimZ);
    if (!threads || threads > MOST_THREADS) return refuse("%s: a program of %u threads", kernel->name, threads);
    if (config->sharedMemBytes > (unsigned)kernel->dynamic_shared)
        return refuse("%s: %u bytes of shared memory, of which it may have %d", kernel->name, config->sharedMemBytes,
                      kernel->dynamic_shared);
    for (int i = 0; i < kernel->parameters; i++)
        if (kernel->alignments[i] && *(uint64_t *)parameters[i] % kernel->alignments[i])
            return refuse("%s: pointer %d is %#llx, compiled for a multiple of %d bytes", kernel->name, i,
                          (unsigned long long)*(uint64_t *)parameters[i], kernel->alignments[i]);
    kernel->launches++;
    return CUDA_SUCCESS;
}
