// What is known about the CUDA side of this binary, with or without CUDA compiled in.
#pragma once
#include "core/common.h"

namespace prefkern {

PK_API const char* cuda_architectures();       // compiled in, comma separated; "" when built without CUDA
PK_API int cuda_runtime_version();             // of the linked runtime, e.g. 13000; 0 when built without CUDA
PK_API const char* cuda_error_string(int error);

constexpr int kBuiltWithoutCuda = -1;          // what every CUDA launcher returns in a CPU-only build

}  // namespace prefkern
