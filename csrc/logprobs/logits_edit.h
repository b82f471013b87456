// What is done to a block of raw logits before it is folded, while it is in cache: rounding to a narrower type, as a sampler
// does whose head writes that type.
//
// The blocks are contiguous [rows, cols].
#pragma once
#include "core/common.h"

namespace prefkern {

// logits = to(logits + bias), once rounded to nearest even.
struct RoundArgs {
  float* logits = nullptr;
  int64_t rows = 0, cols = 0;
  const float* bias = nullptr;  // [cols] or null
  DType to = DType::bf16;       // or f16
};

PK_API void cpu_round_logits(const RoundArgs& args);
// Enqueues on `stream`; returns a cudaError_t.
PK_API int cuda_round_logits(const RoundArgs& args, void* stream);

}  // namespace prefkern
