// The two hand-written passes over logits, for the CPU and for CUDA.
//
// fold_logits reads a block of raw logits once and folds each row into its running softmax statistics; after the last
// block of the vocabulary it writes log-probabilities and the other outputs. The block may be a column range of the
// vocabulary (linear_logprobs walks over such ranges) or whole rows (logits_logprobs).
//
// grad_logits reads a block once more and writes d loss / d raw logit, in place or elsewhere.
//
// S is the accumulator type: float, or double for double logits. Rows are independent, and a row is always summed in
// the same order, so results do not depend on the number of threads.
#pragma once
#include "core/common.h"
#include "math/logits.h"
#include "math/softmax.h"

namespace prefkern {

template <class S> struct LogitBlock {
  DType dtype = DType::f32;  // of the logits; f64 if and only if S is double
  int64_t rows = 0, cols = 0;
  int64_t first_col = 0;     // vocabulary index of column 0
  int64_t vocab = 0;
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  LogitTransform<S> transform;
};

// Row statistics between blocks: 7 arrays of `rows` elements, in the order of SoftmaxRow.
constexpr int kRowStateArrays = 7;

template <class S> struct FoldArgs {
  LogitBlock<S> block;
  const void* logits = nullptr;
  RowMap logits_map;
  bool entropy = false;      // keep the sums that entropy needs
  bool extra = false;        // keep the sums that sum_sq_probs, mean_logit and is_top1 need
  bool first = true, last = true;
  S* state = nullptr;        // [kRowStateArrays, state_stride]; unused when first and last
  int64_t state_stride = 0;
  // Outputs, one per row, written with the last block; null where not wanted. Ignored rows get 0.
  S *logp = nullptr, *out_entropy = nullptr, *lse = nullptr, *sum_sq_probs = nullptr, *mean_logit = nullptr;
  uint8_t* is_top1 = nullptr;
  S *row_max = nullptr, *row_log2_sum = nullptr;  // what grad_logits needs
};

template <class S> struct GradArgs {
  LogitBlock<S> block;
  const void* logits = nullptr;
  RowMap logits_map;
  void* grad = nullptr;      // may be the logits' own memory; a row may then also shrink to a narrower type
  DType grad_dtype = DType::f32;
  RowMap grad_map;
  const S *row_max = nullptr, *row_log2_sum = nullptr;
  const S* entropy = nullptr;                                                   // needed with g_entropy
  const S *g_logp = nullptr, *g_entropy = nullptr, *g_lse = nullptr;            // upstream, null = zero
  S* d_bias = nullptr;       // of cuda_grad_bias: [cols], the gradient of the bias
  bool add_to_bias = false;  // to what is there
  // On CUDA, where the rows of a call were moved together (compact_rows.h): how many there are. Row 0 of the block is row
  // compact_first of them. The gradient's rows are written up to the next multiple of kCompactMultiple only.
  const int64_t* compact_count = nullptr;
  int64_t compact_first = 0;
};

// Matrices of rows that were moved together hold zeros from the last one on up to here: the next multiple beyond a count, at
// least one. Tiles of a GEMM that begin below the count then find what they read.
constexpr int64_t kCompactMultiple = 256;

inline namespace PK_ISA {

PK_HD int64_t compact_end(int64_t count) {
  return count <= kCompactMultiple ? kCompactMultiple : ceil_div(count, kCompactMultiple) * kCompactMultiple;
}

template <class S> PK_HD SoftmaxRow<S> load_state(const FoldArgs<S>& a, int64_t row) {
  const S* s = a.state + row;
  const int64_t d = a.state_stride;
  return {s[0], s[d], s[2 * d], s[3 * d], s[4 * d], s[5 * d], s[6 * d]};
}

template <class S> PK_HD void store_state(const FoldArgs<S>& a, int64_t row, const SoftmaxRow<S>& r) {
  S* s = a.state + row;
  const int64_t d = a.state_stride;
  s[0] = r.max;
  s[d] = r.s;
  s[2 * d] = r.u;
  s[3 * d] = r.q;
  s[4 * d] = r.x;
  s[5 * d] = r.target_pre;
  s[6 * d] = r.best_before;
}

template <class S> PK_HD void write_outputs(const FoldArgs<S>& a, int64_t row, const SoftmaxOutputs<S>& o, S max) {
  if (a.logp) a.logp[row] = o.logp;
  if (a.out_entropy) a.out_entropy[row] = o.entropy;
  if (a.lse) a.lse[row] = o.lse;
  if (a.sum_sq_probs) a.sum_sq_probs[row] = o.sum_sq_probs;
  if (a.mean_logit) a.mean_logit[row] = o.mean_logit;
  if (a.is_top1) a.is_top1[row] = o.is_top1;
  if (a.row_max) {
    a.row_max[row] = max;
    a.row_log2_sum[row] = o.log2_sum;
  }
}

}  // namespace PK_ISA

PK_API void cpu_fold_logits(const FoldArgs<float>& args);
PK_API void cpu_fold_logits(const FoldArgs<double>& args);
PK_API void cpu_grad_logits(const GradArgs<float>& args);
PK_API void cpu_grad_logits(const GradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. Rows whose target is out of range come out NaN.
PK_API int cuda_fold_logits(const FoldArgs<float>& args, void* stream);
PK_API int cuda_grad_logits(const GradArgs<float>& args, void* stream);
// Reads float32 logits and leaves them: before cuda_grad_logits overwrites them.
PK_API int cuda_grad_bias(const GradArgs<float>& args, void* stream);

}  // namespace prefkern
