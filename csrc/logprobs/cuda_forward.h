// Which kernels make the head's forward on CUDA.
//   stage1: cuBLAS writes blocks of logits, fold_logits reads them (linear_walk.cpp). Every device, type and option.
//   stage2: one kernel that folds logits in registers (hopper_forward.h). Compute capability 9.0, bfloat16 and float16; other
//           calls take stage1.
//   automatic: stage2 where a measurement showed it ahead (kMeasuredWins), else stage1.
#pragma once
#include "core/common.h"

namespace prefkern {

enum class CudaForward : int32_t { automatic = 0, stage1 = 1, stage2 = 2 };

// Set once from PREFKERN_CUDA_FORWARD (auto, stage1, stage2), and by set_cuda_forward. Forward passes ask when they start.
PK_API CudaForward cuda_forward();
PK_API void set_cuda_forward(CudaForward path);
PK_API const char* cuda_forward_name(CudaForward path);

// Whether `automatic` takes stage2.
PK_API bool stage2_measured_ahead(int64_t rows, int64_t width, int64_t vocab);

}  // namespace prefkern
