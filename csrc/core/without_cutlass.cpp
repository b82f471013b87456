// The entry points of Hopper's kernels (hopper_*_cuda.cu) in a build without them: without CUDA, CUTLASS' headers, or 9.0a.
#if defined(PREFKERN_NO_CUTLASS)
#include "core/gemm_bounded.h"
#include "logprobs/hopper_forward.h"

namespace prefkern {
namespace {
constexpr int kNotSupported = 801;  // cudaErrorNotSupported
}  // namespace

const char* cutlass_version() { return ""; }
bool hopper_device() { return false; }
int64_t hopper_tile_columns(int64_t, bool) { return 256; }
int cuda_hopper_head(const HopperHeadArgs&, void*) { return kNotSupported; }
int cuda_gemm_bounded(const BoundedGemmArgs&, void*) { return kNotSupported; }
}  // namespace prefkern
#endif
