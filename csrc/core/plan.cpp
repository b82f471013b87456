#include "core/plan.h"

#include <algorithm>

#include "core/gemm.h"

namespace prefkern {
namespace {

// CPU: a block of logits should survive in the last-level cache between the GEMM that writes it and the fold that reads
// it, and still be wide enough for the GEMM to run at its full rate.
// CUDA: no cache holds a block that keeps all multiprocessors busy, and so blocks are large. How many rows they have is a
// matter of what passes over the gradients cost: see cuda_backward.
constexpr int64_t kCpuBudget = int64_t(48) << 20, kCudaBudget = int64_t(512) << 20;
constexpr int64_t kCpuLogits = int64_t(4) << 20;  // of the budget, for the block of logits, unless the caller sets one
constexpr int64_t kCpuRows = 2048, kCudaRows = 4096;
constexpr int64_t kCpuMinColumns = 512, kCudaMinColumns = 2048;
// Kept logits: every chunk adds its share to the weight's gradient, V x H of it, which many rows make up for. On CUDA a
// launch over all columns is best. Without that gradient logits stay in the last-level cache of the CPU, unless rows get too few for
// a GEMM, which packs the weight once per chunk; and memory of that size an allocator uses again instead of asking for new pages.
constexpr int64_t kCpuKept = int64_t(128) << 20, kCudaKept = int64_t(1) << 30;
constexpr int64_t kCpuKeptFrozen = int64_t(24) << 20, kCpuKeptRows = 128;
constexpr int64_t kColumnMultiple = 64, kMinColumns = 64;
// A thread's block of logits in a fused forward: a slice of the weight is packed once for so many rows, and rows are folded while
// they are in the L2 cache.
constexpr int64_t kFusedRows = 512, kFusedColumns = 512;

int64_t round_down(int64_t x, int64_t multiple) { return x - x % multiple; }

int64_t whole_columns(int64_t cols, int64_t vocab) {
  cols = std::clamp<int64_t>(cols, 1, vocab);
  return cols < vocab && cols > kColumnMultiple ? round_down(cols, kColumnMultiple) : cols;
}

// Every block of the vocabulary reads and writes the float32 gradient of hidden once. A single chunk of rows writes the
// gradient of the weight once, in its own type; of several, each reads and writes it in float32, and if it is narrow, it is
// narrowed at last. The fewest bytes win among chunks that leave a GEMM enough columns.
ChunkPlan cuda_backward(const PlanRequest& r, int64_t budget) {
  const int64_t own = r.dtype == DType::f32 ? 4 : 2, logit = r.logit_bytes > 0 ? r.logit_bytes : 4;
  ChunkPlan best;
  double fewest = 0;
  for (int64_t rows = r.rows;; rows = ceil_div(rows, 2)) {
    const int64_t chunks = ceil_div(r.rows, rows), per_column = chunks > 1 && own < 4 ? 4 * r.hidden : 0;
    const int64_t cols = whole_columns(budget / (logit * rows + per_column), r.vocab),
                  bytes = cols * (logit * rows + per_column);
    const bool fits = bytes <= budget && cols >= std::min(r.vocab, rows > 1 ? kCudaMinColumns : 1);
    const double weight_bytes = chunks == 1 ? own : 4.0 * double(2 * chunks - 1) + (own < 4 ? 4 + own : 0);
    const double moved = 8.0 * double(r.rows) * double(ceil_div(r.vocab, cols)) + weight_bytes * double(r.vocab);
    if (fits && (best.row_chunk == 0 || moved < fewest)) {
      best = {rows, cols, bytes};
      fewest = moved;
    }
    if (rows == 1) return best.row_chunk > 0 ? best : ChunkPlan{1, cols, bytes};
    if (best.row_chunk > 0 && rows <= kCudaRows) return best;
  }
}

ChunkPlan fused_forward_plan(const PlanRequest& r) {
  const int64_t rows = std::min(r.rows, kFusedRows), cols = std::min(r.vocab, kFusedColumns),
                held = std::min(r.rows, kFusedStateRows);
  const int64_t per_thread = gemm_of_isa().workspace(rows, cols, r.hidden) + rows * fused_stride(cols) + held * kFusedLaneState;
  const int64_t states = fused_spans(r.vocab).count * kFusedStateArrays * held;
  return {rows, cols, 4 * (r.fused_threads * per_thread + states), true};
}

}  // namespace

FusedSpans fused_spans(int64_t vocab) {
  constexpr int64_t most = 16;
  const int64_t cols = std::max(kFusedColumns, ceil_div(ceil_div(vocab, most), kColumnMultiple) * kColumnMultiple);
  return {cols, ceil_div(vocab, cols)};
}

int64_t default_chunk_bytes(bool cuda) { return cuda ? kCudaBudget : kCpuBudget; }

ChunkPlan plan_chunks(const PlanRequest& r) {
  if (r.rows <= 0 || r.vocab <= 0) return {};
  const int64_t acc = r.dtype == DType::f64 ? 8 : 4;
  const int64_t logit = r.logit_bytes > 0 ? r.logit_bytes : acc;
  const bool narrow = r.dtype == DType::bf16 || r.dtype == DType::f16;
  // The CPU multiplies in float32, and a library wants blocks of hidden and weight widened first.
  const bool widen = narrow && !r.cuda && !own_gemm();
  // Bytes beside the logits: per row, the widened hidden row; per column, the widened weight row and, where the weight's
  // gradient is not float32 itself, its float32 accumulator.
  const int64_t per_row = widen ? 4 * r.hidden : 0;
  const int64_t per_column = (widen ? 4 * r.hidden : 0) + (narrow && r.backward ? 4 * r.hidden : 0);
  const int64_t budget = r.budget_bytes > 0 ? r.budget_bytes : default_chunk_bytes(r.cuda);
  if (r.fused_threads > 0 && !r.cuda && !r.backward && acc == 4) {
    const ChunkPlan plan = fused_forward_plan(r);
    if (r.budget_bytes <= 0 || plan.workspace_bytes <= r.budget_bytes) return plan;
  }
  if (r.cuda && r.backward && acc == 4) return cuda_backward(r, budget);

  int64_t rows = std::min(r.rows, r.cuda ? kCudaRows : kCpuRows);
  const auto columns_for = [&](int64_t n) { return (budget - n * per_row) / (n * logit + per_column); };
  while (rows > 1 && columns_for(rows) < std::min(r.vocab, kMinColumns)) rows = (rows + 1) / 2;
  int64_t cols = std::clamp<int64_t>(columns_for(rows), 1, r.vocab);
  if (r.budget_bytes <= 0 && !r.cuda) cols = std::min(cols, std::max(kCpuMinColumns, kCpuLogits / (rows * logit)));
  cols = whole_columns(cols, r.vocab);
  return {rows, cols, rows * cols * logit + rows * per_row + cols * per_column};
}

int64_t kept_block(int64_t rows, int64_t vocab, DType dtype, bool cuda) {
  if (cuda || rows <= 0) return vocab;
  const int64_t acc = dtype == DType::f64 ? 8 : 4;
  const int64_t cols = std::max(kCpuMinColumns, kCpuLogits / (rows * acc));
  return std::min(vocab, round_down(cols, kColumnMultiple));
}

ChunkPlan plan_kept(const PlanRequest& r) {
  if (r.rows <= 0 || r.vocab <= 0) return {};
  const int64_t acc = r.dtype == DType::f64 ? 8 : 4, own = r.dtype == DType::f64 ? 8 : r.dtype == DType::f32 ? 4 : 2;
  const bool narrow = own < 4, on_cpu = narrow && !r.cuda, widen = on_cpu && !own_gemm();
  // Beside the logits, per row: the gathered hidden row, its widened copy, its gradient; per column of a block: the widened
  // row of the weight and the accumulator of its gradient.
  const int64_t per_row = r.vocab * acc + r.hidden * (own + (widen ? 4 : 0) + (r.backward ? acc : 0));
  const int64_t budget = r.budget_bytes > 0 ? r.budget_bytes : r.cuda ? kCudaKept : kCpuKept;
  int64_t rows = std::clamp<int64_t>(budget / per_row, 1, r.rows);
  if (!r.cuda && !r.weight_grad && r.budget_bytes <= 0) rows = std::min(rows, std::max(kCpuKeptRows, kCpuKeptFrozen / per_row));
  const int64_t cols = kept_block(rows, r.vocab, r.dtype, r.cuda);
  const int64_t per_column = (widen ? 4 * r.hidden : 0) + (on_cpu && r.backward ? 4 * r.hidden : 0);
  return {rows, cols, rows * per_row + cols * per_column};
}

}  // namespace prefkern
