// logits_logprobs: the same statistics and gradients on logits the caller already has, in one read forward and one read
// and one write backward. logits is [N, V], or [B, T, V] with any strides before the last axis, so that
// logits[:, :-1] needs no copy.
#include "logprobs/head.h"

namespace prefkern {
namespace {

struct Logits {
  Tensor tensor;
  DType dtype, acc;
  int64_t rows, vocab;
  RowMap map;
};

RowMap row_map(const Tensor& t) {
  if (t.dim() == 2) return {1, t.stride(0), 0};
  return {t.size(1) > 0 ? t.size(1) : 1, t.stride(0), t.stride(1)};
}

Logits check_logits(const Tensor& t) {
  const DType dtype = float_dtype(t, "logits");
  check_value(t.dim() == 2 || t.dim() == 3, "logits has shape ", shape_text(t), "; expected [N, V] or [B, T, V]");
  const int64_t vocab = t.size(t.dim() - 1);
  check_value(vocab > 0, "logits has V = 0; a vocabulary needs at least one token");
  return {t, dtype, accumulator(dtype), t.numel() / vocab, vocab, row_map(t)};
}

bool adjacent_columns(const Logits& l) { return l.vocab == 1 || l.tensor.stride(l.tensor.dim() - 1) == 1; }

// Whether two rows share memory, as after expand().
bool rows_overlap(const Logits& l) {
  const Tensor& t = l.tensor;
  int64_t n = t.size(0), step = t.stride(0), inner_n = 1, inner_step = 0;
  if (t.dim() == 3) {
    inner_n = t.size(1);
    inner_step = t.stride(1);
  }
  if (n <= 1 || (inner_n > 1 && step < inner_step)) {
    std::swap(n, inner_n);
    std::swap(step, inner_step);
  }
  int64_t extent = l.vocab;  // of one row, then of all rows of the shorter stride
  if (inner_n > 1) {
    if (inner_step < extent) return true;
    extent += (inner_n - 1) * inner_step;
  }
  return n > 1 && step < extent;
}

void check_inplace(const Logits& l) {
  check_value(adjacent_columns(l), "logits has a stride of ", l.tensor.stride(l.tensor.dim() - 1),
              " in its last dimension; inplace_backward needs 1");
  check_value(!rows_overlap(l),
              "logits has rows that share memory, as expand() makes them; inplace_backward would write them twice");
}

template <class S>
void fold(const Logits& l, const Tensor& targets, const OptTensor& tau, const HeadOptions& o, int64_t outputs,
          const HeadOutputs& out) {
  FoldArgs<S> f;
  f.block = logit_block<S>(l.dtype, l.rows, l.vocab, l.vocab, targets, o, tau);
  f.logits = l.tensor.const_data_ptr();
  f.logits_map = l.map;
  set_outputs(f, out, outputs, l.rows);
  run_fold(f, current_stream(l.tensor), l.tensor.is_cuda());
}

struct Backward {
  Logits logits;
  Tensor targets;
  OptTensor tau;
  HeadOptions options;
  Upstream up;
  Tensor entropy, stats;
};

Backward check_backward(const OptTensor& g_logp, const OptTensor& g_entropy, const OptTensor& g_lse, const Tensor& logits,
                        const Tensor& targets, const OptTensor& row_temperature, const Tensor& entropy, const Tensor& stats,
                        const HeadOptions& options) {
  check_head_options(options);
  const Logits l = check_logits(logits);
  return {l,
          checked_targets(targets, logits, "logits", l.rows, l.vocab, options.ignore_index).first,
          checked_row_temperature(row_temperature, logits, "logits", l.rows, l.acc),
          options,
          checked_upstream(g_logp, g_entropy, g_lse, l.rows, l.acc, entropy, stats),
          entropy,
          stats};
}

template <class S> void run_backward(const Backward& b, Tensor& into, const RowMap& into_map) {
  GradArgs<S> g;
  g.block = logit_block<S>(b.logits.dtype, b.logits.rows, b.logits.vocab, b.logits.vocab, b.targets, b.options, b.tau);
  g.logits = b.logits.tensor.const_data_ptr();
  g.logits_map = b.logits.map;
  g.grad = into.mutable_data_ptr();
  g.grad_dtype = b.logits.dtype;
  g.grad_map = into_map;
  set_upstream(g, b.up, b.entropy, b.stats, b.logits.rows);
  run_grad(g, current_stream(b.logits.tensor), b.logits.tensor.is_cuda());
}

void run_backward(const Backward& b, Tensor& into, const RowMap& into_map) {
  if (b.logits.rows == 0) return;
  b.logits.acc == DType::f64 ? run_backward<double>(b, into, into_map) : run_backward<float>(b, into, into_map);
}

}  // namespace

HeadOutputs logits_logprobs(const Tensor& logits, const Tensor& targets, OptTensor row_temperature, double temperature,
                            double softcap, double logit_scale, int64_t ignore_index, int64_t outputs, bool inplace_backward) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  check_head_options(options);
  Logits l = check_logits(logits);
  const OnDevice guard(logits);
  if (inplace_backward && (outputs & kSaveStats)) check_inplace(l);  // here rather than in the middle of a backward
  if (!adjacent_columns(l)) l = check_logits(torch::stable::contiguous(logits));
  const Tensor t = checked_targets(targets, logits, "logits", l.rows, l.vocab, ignore_index).first;
  const OptTensor tau = checked_row_temperature(row_temperature, logits, "logits", l.rows, l.acc);
  const HeadOutputs out = make_outputs(outputs, l.rows, l.acc, logits, false);
  if (l.rows == 0) return out;
  l.acc == DType::f64 ? fold<double>(l, t, tau, options, outputs, out) : fold<float>(l, t, tau, options, outputs, out);
  return out;
}

Tensor logits_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& logits,
                                const Tensor& targets, OptTensor row_temperature, const Tensor& entropy, const Tensor& stats,
                                double temperature, double softcap, double logit_scale, int64_t ignore_index) {
  const OnDevice guard(logits);
  Backward b = check_backward(g_logp, g_entropy, g_lse, logits, targets, row_temperature, entropy, stats,
                              {temperature, softcap, logit_scale, ignore_index});
  if (!adjacent_columns(b.logits)) b.logits = check_logits(torch::stable::contiguous(logits));
  Tensor grad = logits.dim() == 2 ? empty({logits.size(0), logits.size(1)}, logits.scalar_type(), logits)
                                  : empty({logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type(), logits);
  run_backward(b, grad, row_map(grad));
  return grad;
}

void logits_logprobs_backward_inplace(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, Tensor logits,
                                      const Tensor& targets, OptTensor row_temperature, const Tensor& entropy,
                                      const Tensor& stats, double temperature, double softcap, double logit_scale,
                                      int64_t ignore_index) {
  const OnDevice guard(logits);
  const Backward b = check_backward(g_logp, g_entropy, g_lse, logits, targets, row_temperature, entropy, stats,
                                    {temperature, softcap, logit_scale, ignore_index});
  check_inplace(b.logits);
  run_backward(b, logits, b.logits.map);
}

}  // namespace prefkern
