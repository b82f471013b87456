#include "core/cuda_runtime.h"

#include "core/cuda.cuh"

namespace prefkern {
const char* cuda_architectures() { return PREFKERN_CUDA_ARCHS; }
int cuda_runtime_version() { return CUDART_VERSION; }
const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}  // namespace prefkern
