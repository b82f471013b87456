// How a head cuts its work: blocks of rows x columns of the logits, so that a block and what goes with it fit a
// budget. The plan depends on shapes, type, device kind and budget only, never on free memory: equal calls then take
// equal paths and give equal bits.
#pragma once
#include "core/common.h"

namespace prefkern {

struct ChunkPlan {
  int64_t row_chunk = 0, vocab_block = 0, workspace_bytes = 0;
};

struct PlanRequest {
  int64_t rows = 0, hidden = 0, vocab = 0;
  DType dtype = DType::f32;
  bool cuda = false, backward = false;
  int64_t budget_bytes = 0;  // 0: the default of the device kind
  int64_t logit_bytes = 0;   // of one logit of a block; 0: those of the accumulator
};

PK_API ChunkPlan plan_chunks(const PlanRequest& request);

// linear_chunk instead keeps the logits of its rows, block after block, until their gradient is known. row_chunk is how many
// rows fit the budget (at least one, at most those of the request), vocab_block how wide a block of so many rows is.
PK_API ChunkPlan plan_kept(const PlanRequest& request);
int64_t kept_block(int64_t rows, int64_t vocab, DType dtype, bool cuda);
PK_API int64_t default_chunk_bytes(bool cuda);

}  // namespace prefkern
