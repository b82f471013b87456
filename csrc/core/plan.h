// How a head cuts its work: blocks of rows x columns of the logits, so that a block and what goes with it fit a
// budget. The plan depends on shapes, type, device kind and budget only, never on free memory: equal calls then take
// equal paths and give equal bits.
#pragma once
#include "core/common.h"

namespace prefkern {

struct ChunkPlan {
  int64_t row_chunk = 0, vocab_block = 0, workspace_bytes = 0;
  bool fused = false;  // every thread has blocks of its own, and folds them in the epilogue of their product
};

struct PlanRequest {
  int64_t rows = 0, hidden = 0, vocab = 0;
  DType dtype = DType::f32;
  bool cuda = false, backward = false;
  int64_t budget_bytes = 0;  // 0: the default of the device kind
  int64_t logit_bytes = 0;   // of one logit of a block; 0: those of the accumulator
  int64_t fused_threads = 0; // of a fused forward on the CPU, if it may be one and the budget is large enough; 0: it may not
  bool weight_grad = true;   // of kept logits: whether each chunk adds to a gradient of the weight
};

// A fused forward cuts the vocabulary into spans, which depend on its size alone, and holds the states of at most so many rows, one
// per span, and what a row is folded into meanwhile.
struct FusedSpans {
  int64_t cols, count;
};
FusedSpans fused_spans(int64_t vocab);
constexpr int64_t kFusedStateRows = 1024, kFusedStateArrays = 7, kFusedLaneState = 64;
// Of a row of a block of `cols` columns: rows do not fall on the same sets of a cache.
constexpr int64_t fused_stride(int64_t cols) { return cols + 16; }

PK_API ChunkPlan plan_chunks(const PlanRequest& request);

// linear_chunk instead keeps the logits of its rows, block after block, until their gradient is known. row_chunk is how many
// rows fit the budget (at least one, at most those of the request), vocab_block how wide a block of so many rows is.
PK_API ChunkPlan plan_kept(const PlanRequest& request);
int64_t kept_block(int64_t rows, int64_t vocab, DType dtype, bool cuda);
PK_API int64_t default_chunk_bytes(bool cuda);

}  // namespace prefkern
