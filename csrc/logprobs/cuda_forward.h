// Which kernels make the head's forward and backward on CUDA.
//
// Forward:
//   stage1: cuBLAS writes blocks of logits, fold_logits reads them (linear_walk.cpp). Every device, type and option.
//   stage2: one kernel that folds logits in registers (hopper_forward.h). Compute capability 9.0, bfloat16 and float16; other
//           calls take stage1.
//   automatic: stage2 where a measurement showed it ahead (kMeasuredWins), else stage1.
// Backward:
//   dense: every row takes part, also those whose gradient is 0.
//   compact: rows with a gradient move together, and products run over as many as there are (hopper_backward.h). Where stage2
//           runs; other calls are dense.
//   automatic: dense, until compact is measured.
#pragma once
#include "core/common.h"

namespace prefkern {

enum class CudaForward : int32_t { automatic = 0, stage1 = 1, stage2 = 2 };

// Set once from PREFKERN_CUDA_FORWARD (auto, stage1, stage2), and by set_cuda_forward. Forward passes ask when they start.
PK_API CudaForward cuda_forward();
PK_API void set_cuda_forward(CudaForward path);
PK_API const char* cuda_forward_name(CudaForward path);

enum class CudaBackward : int32_t { automatic = 0, dense = 1, compact = 2 };

// As above, from PREFKERN_CUDA_BACKWARD (auto, dense, compact).
PK_API CudaBackward cuda_backward();
PK_API void set_cuda_backward(CudaBackward path);
PK_API const char* cuda_backward_name(CudaBackward path);

// Whether `automatic` takes stage2.
PK_API bool stage2_measured_ahead(int64_t rows, int64_t width, int64_t vocab);

}  // namespace prefkern
