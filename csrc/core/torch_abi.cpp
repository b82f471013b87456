#include "core/torch_abi.h"

#include "core/tensor.h"

namespace prefkern {
uint64_t torch_abi_built() { return TORCH_ABI_VERSION; }
uint64_t torch_abi_target() { return TORCH_TARGET_VERSION; }
uint64_t torch_abi_running() { return aoti_torch_abi_version(); }
bool torch_has_cuda_stream() { return cuda_symbol("aoti_torch_get_current_cuda_stream") != nullptr; }
}  // namespace prefkern
