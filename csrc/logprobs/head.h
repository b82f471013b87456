// What linear_logprobs and logits_logprobs share on the torch side: argument checks, outputs, upstream gradients.
#pragma once
#include "core/cuda_runtime.h"
#include "core/tensor.h"
#include "logprobs/active_rows.h"
#include "logprobs/logits_edit.h"
#include "logprobs/logits_fold.h"
#include "logprobs/ops.h"

namespace prefkern {

struct HeadOptions {
  double temperature, softcap, logit_scale;
  int64_t ignore_index;
};

void check_head_options(const HeadOptions& o);
// int64, contiguous; on the CPU every value is checked to be ignore_index or in [0, vocab). Returns the targets and, on
// the CPU, how many rows are ignored.
std::pair<Tensor, int64_t> checked_targets(const Tensor& targets, const Tensor& scores, const char* scores_name, int64_t rows,
                                           int64_t vocab, int64_t ignore_index);
// Rows that count, as indices: on the CPU ignored rows leave before the GEMM.
Tensor active_rows(const Tensor& targets, int64_t ignored, int64_t ignore_index);
inline OptTensor index_optional(const OptTensor& t, const Tensor& rows) { return t ? OptTensor(index_rows(*t, rows)) : t; }
// In the accumulator type, contiguous; on the CPU every value is checked to be positive and finite.
OptTensor checked_row_temperature(const OptTensor& t, const Tensor& scores, const char* scores_name, int64_t rows, DType acc);

// hidden [N, H] with 0 in the rows whose target is ignored, without asking the device how many there are: their gradient
// is 0, but 0 times NaN would still reach the weight's gradient.
Tensor without_ignored_rows(const Tensor& hidden, const Tensor& targets, int64_t ignore_index);

// Allocates what `outputs` asks for; zeroed where some rows will not be written.
HeadOutputs make_outputs(int64_t outputs, int64_t rows, DType acc, const Tensor& like, bool zero);
HeadOutputs scatter_outputs(const HeadOutputs& compact, int64_t outputs, int64_t rows, const Tensor& active, DType acc);

struct Upstream {
  OptTensor logp, entropy, lse;  // contiguous, accumulator type
};
Upstream checked_upstream(const OptTensor& g_logp, const OptTensor& g_entropy, const OptTensor& g_lse, int64_t rows, DType acc,
                          const Tensor& entropy, const Tensor& stats);

// The rows that a backward has to take: they count, and their upstream gradients are not all 0. No other row contributes, nor
// is its hidden state looked at: 0 times NaN is no gradient.
struct ActiveRows {
  Tensor targets;   // [N], ignore_index in all others
  OptTensor index;  // int64, ascending, where some are not active and the host knows which
  int64_t count;    // of them; N where the host does not know
};
// The host knows on the CPU. On CUDA it would have to wait: all rows stay in their places, and kernels see by the targets
// which are not active. A walk that takes the index and the number of rows from device memory has its place here.
ActiveRows active_rows_of(const Tensor& targets, int64_t ignore_index, const Upstream& up);

template <class S>
LogitBlock<S> logit_block(DType dtype, int64_t rows, int64_t cols, int64_t vocab, const Tensor& targets, const HeadOptions& o,
                          const OptTensor& row_temperature) {
  LogitBlock<S> b;
  b.dtype = dtype;
  b.rows = rows;
  b.cols = cols;
  b.vocab = vocab;
  b.targets = data<int64_t>(targets);
  b.ignore_index = o.ignore_index;
  b.transform.scale = S(o.logit_scale);
  b.transform.softcap = S(o.softcap);
  b.transform.temperature = S(o.temperature);
  b.transform.row_temperature = data_or_null<S>(row_temperature);
  return b;
}

template <class S> void set_sums(FoldArgs<S>& f, int64_t outputs) {
  f.entropy = outputs & kEntropy;
  f.extra = outputs & (kSumSqProbs | kMeanLogit | kIsTop1);
}

template <class S> void set_outputs(FoldArgs<S>& f, const HeadOutputs& out, int64_t outputs, int64_t rows) {
  const auto& [logp, entropy, lse, sum_sq, mean, top1, stats] = out;
  set_sums(f, outputs);
  f.logp = mutable_data<S>(logp);
  if (outputs & kEntropy) f.out_entropy = mutable_data<S>(entropy);
  if (outputs & kLse) f.lse = mutable_data<S>(lse);
  if (outputs & kSumSqProbs) f.sum_sq_probs = mutable_data<S>(sum_sq);
  if (outputs & kMeanLogit) f.mean_logit = mutable_data<S>(mean);
  if (outputs & kIsTop1) f.is_top1 = mutable_data<uint8_t>(top1);
  if (outputs & kSaveStats) {
    f.row_max = mutable_data<S>(stats);
    f.row_log2_sum = f.row_max + rows;
  }
}

template <class S>
void set_upstream(GradArgs<S>& g, const Upstream& up, const Tensor& entropy, const Tensor& stats, int64_t rows) {
  g.row_max = data<S>(stats);
  g.row_log2_sum = g.row_max + rows;
  g.entropy = up.entropy ? data<S>(entropy) : nullptr;
  g.g_logp = data_or_null<S>(up.logp);
  g.g_entropy = data_or_null<S>(up.entropy);
  g.g_lse = data_or_null<S>(up.lse);
}

// Shifts per-row pointers so that row 0 of the block is row `first` of the call.
template <class S> void advance_rows(LogitBlock<S>& b, int64_t first) {
  b.targets += first;
  if (b.transform.row_temperature) b.transform.row_temperature += first;
}

inline void run_fold(const FoldArgs<float>& f, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_fold_logits(f, stream)) : cpu_fold_logits(f);
}
inline void run_fold(const FoldArgs<double>& f, void*, bool) { cpu_fold_logits(f); }
inline void run_grad(const GradArgs<float>& g, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_grad_logits(g, stream)) : cpu_grad_logits(g);
}
inline void run_grad(const GradArgs<double>& g, void*, bool) { cpu_grad_logits(g); }
inline void run_round(const RoundArgs& r, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_round_logits(r, stream)) : cpu_round_logits(r);
}
inline void run_keep(const KeepArgs<float>& k, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_keep_logits(k, stream)) : cpu_keep_logits(k);
}
inline void run_keep(const KeepArgs<double>& k, void*, bool) { cpu_keep_logits(k); }
inline void run_kept_upstream(const KeptUpstreamArgs<float>& u, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_kept_upstream(u, stream)) : cpu_kept_upstream(u);
}
inline void run_kept_upstream(const KeptUpstreamArgs<double>& u, void*, bool) { cpu_kept_upstream(u); }
inline void run_active_targets(const ActiveTargetsArgs<float>& a, void* stream, bool cuda) {
  cuda ? check_cuda(cuda_active_targets(a, stream)) : cpu_active_targets(a);
}
inline void run_active_targets(const ActiveTargetsArgs<double>& a, void*, bool) { cpu_active_targets(a); }
// The gradient of the bias from float32 logits that run_grad has not overwritten yet.
inline void bias_on_cuda(GradArgs<float> g, float* d_bias, bool add, void* stream) {
  g.d_bias = d_bias;
  g.add_to_bias = add;
  check_cuda(cuda_grad_bias(g, stream));
}
inline void bias_on_cuda(const GradArgs<double>&, double*, bool, void*) { fail("RuntimeError", "float64 is for the CPU"); }

}  // namespace prefkern
