// Versions of the stable ABI, and whether the running torch has CUDA.
#pragma once
#include "core/common.h"

namespace prefkern {
PK_API uint64_t torch_abi_built();
PK_API uint64_t torch_abi_target();
PK_API uint64_t torch_abi_running();
PK_API bool torch_has_cuda_stream();
}  // namespace prefkern
