// Rows that contribute to a backward, moved together on the device: their number stays there, and nobody waits for it.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

// Where rows go. `targets` is ignore_index for those that do not contribute.
struct CompactArgs {
  int64_t rows = 0;
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  int64_t* count = nullptr;  // one number: how many there are
  int64_t* index = nullptr;  // [rows]: their rows, ascending, and then -1
  int64_t* place = nullptr;  // [rows]: where each row went, -1 for those that were left out
};

// out[i] = in[index[i]] for i < *count, then zeros up to compact_end(*count) or the last row.
struct GatherRowsArgs {
  int64_t rows = 0, bytes = 0;  // bytes of a row
  const int64_t *index = nullptr, *count = nullptr;
  const void* in = nullptr;
  int64_t in_stride = 0;  // bytes from one row to the next
  void* out = nullptr;    // adjacent rows
};

// The vectors that go with the rows, null where there is none, into row k of `out` [kCompactVectors, rows] in the order of the
// members. Beyond the count, up to the last row: ignore_index for the targets, 1 for the temperature, else 0.
constexpr int kCompactVectors = 7;
struct GatherVectorsArgs {
  int64_t rows = 0;
  const int64_t* index = nullptr;
  int64_t ignore_index = -100;
  const int64_t* targets = nullptr;
  int64_t* out_targets = nullptr;
  const float *row_max = nullptr, *row_log2_sum = nullptr, *entropy = nullptr;
  const float *g_logp = nullptr, *g_entropy = nullptr, *g_lse = nullptr, *temperature = nullptr;
  float* out = nullptr;
};

// out[row] = in[place[row]], 0 where that is -1, narrowed to `dtype`.
struct ScatterRowsArgs {
  int64_t rows = 0, width = 0;
  const int64_t* place = nullptr;
  const float* in = nullptr;
  void* out = nullptr;
  DType dtype = DType::f32;
};

// Enqueue on `stream`; return a cudaError_t. Equal input gives equal bits: rows keep their order.
PK_API int cuda_compact(const CompactArgs& args, void* stream);
PK_API int cuda_gather_rows(const GatherRowsArgs& args, void* stream);
PK_API int cuda_gather_vectors(const GatherVectorsArgs& args, void* stream);
PK_API int cuda_scatter_rows(const ScatterRowsArgs& args, void* stream);

}  // namespace prefkern
