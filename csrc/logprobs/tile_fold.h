// The parts of a row's softmax statistics that a GEMM's epilogue leaves, one for each tile of columns, and the kernel that
// joins them: what fold_logits is where the logits never reach memory.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

constexpr int kTileParts = 3;  // arrays of a tile's parts: maximum, s and u of SoftmaxSums

// What a tile is folded into. block.cols are all columns of the call; block.dtype is not read.
struct TileFoldArgs {
  LogitBlock<float> block;
  float* parts = nullptr;  // [tiles, kTileParts, rows]
  float* target_pre = nullptr;  // [rows]; written where a row's target lies in the columns
};

struct TileMergeArgs {
  TileFoldArgs tiles;
  int64_t count = 0;  // of tiles, at least 1
  FoldArgs<float> rows;  // the outputs, or with `last` unset the state; of `block` nothing is read
};

// Joins the parts of each row in a fixed order. Enqueues on `stream`; returns a cudaError_t.
PK_API int cuda_merge_tiles(const TileMergeArgs& args, void* stream);

}  // namespace prefkern
