// The head's forward on Hopper: one kernel multiplies hidden with the weight and folds each tile of logits while it is in
// registers (tile_fold.cuh), a second one joins what the tiles left. No logits reach memory.
#pragma once
#include "logprobs/tile_fold.h"

namespace prefkern {

struct HopperHeadArgs {
  TileFoldArgs tiles;     // block.rows, cols, targets, ...; block.dtype is that of hidden and of the weight: bf16 or f16
  const void *hidden = nullptr, *weight = nullptr;  // [rows, width], [cols, width]; adjacent columns
  int64_t width = 0, hidden_stride = 0, weight_stride = 0;  // in elements
};

// The version of CUTLASS this kernel was compiled with, e.g. "4.2.0"; "" where it is not in the binary: built without CUTLASS'
// headers, or not for 9.0a.
PK_API const char* cutlass_version();
inline bool hopper_head_compiled() { return *cutlass_version() != 0; }
PK_API bool hopper_device();  // the current one has compute capability 9.0
// Columns of a tile; the parts of TileFoldArgs have ceil(cols / that) tiles. plain: neither bias nor softcap.
PK_API int64_t hopper_tile_columns(int64_t width, bool plain);
// Pointers and strides that the tensor memory accelerator takes.
PK_API bool hopper_head_takes(const HopperHeadArgs& args);
// Enqueues on `stream`; returns a cudaError_t. For devices of compute capability 9.0 only.
PK_API int cuda_hopper_head(const HopperHeadArgs& args, void* stream);

}  // namespace prefkern
