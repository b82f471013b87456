// linear_logprobs: log-probabilities of targets under softmax(hidden @ weight.T), with no [N, V] tensor anywhere.
//
// The walk is the same on the CPU and on CUDA. Over blocks of the vocabulary (outer) and chunks of rows (inner): a vendor
// GEMM writes a block of logits in the accumulator type, and fold_logits folds it while it is still in cache. The
// backward recomputes each block, grad_logits turns it into d loss / d logits in place, and two GEMMs take it to the
// gradients. With the vocabulary outermost, a block of the weight's gradient is complete when its block ends, so its
// float32 accumulator is as small as the block.
#include <algorithm>

#include "core/gemm.h"
#include "core/plan.h"
#include "logprobs/head.h"
#include "logprobs/logits_fold.h"

namespace prefkern {
namespace {

struct Head {
  Tensor hidden, weight, targets;
  OptTensor bias, row_temperature;  // accumulator type
  HeadOptions options;
  DType dtype, acc;
  int64_t rows, width, vocab;
  bool cuda;
  void* stream;
  ChunkPlan plan;
};

void check_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, int64_t chunk_bytes) {
  check_value(hidden.dim() == 2, "hidden has shape ", shape_text(hidden), "; expected [N, H]");
  check_value(weight.dim() == 2, "weight has shape ", shape_text(weight), "; expected [V, H]");
  float_dtype(hidden, "hidden");
  float_dtype(weight, "weight");
  check_same_device(weight, "weight", hidden, "hidden");
  check_type(hidden.scalar_type() == weight.scalar_type(), "hidden has dtype ", dtype_name(hidden.scalar_type()),
             " and weight ", dtype_name(weight.scalar_type()), "; they must be equal");
  check_value(hidden.size(1) == weight.size(1), "hidden has H = ", hidden.size(1), " and weight has H = ", weight.size(1),
              "; they must be equal");
  check_value(hidden.size(1) > 0, "hidden has H = 0; at least 1 is expected");
  check_value(weight.size(0) > 0, "weight has V = 0; a vocabulary needs at least one token");
  check_value(chunk_bytes >= 0, "chunk_bytes is ", chunk_bytes, "; it must be positive, or None for the default");
  if (bias) {
    float_dtype(*bias, "bias");
    check_same_device(*bias, "bias", hidden, "hidden");
    check_value(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias has shape ", shape_text(*bias), "; expected [",
                weight.size(0), "]");
  }
}

// As a GEMM takes it: adjacent columns, rows that do not overlap (expand() gives them a stride of 0).
Tensor gemm_layout(const Tensor& t) {
  const bool columns = t.size(1) == 1 || t.stride(1) == 1, rows = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  return columns && rows ? t : torch::stable::contiguous(t);
}
int64_t row_stride(const Tensor& t) { return std::max(t.stride(0), t.size(1)); }  // of a single row it may be anything

Head make_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
               const OptTensor& row_temperature, const HeadOptions& options, int64_t chunk_bytes, bool backward) {
  const DType dtype = float_dtype(hidden, "hidden"), acc = accumulator(dtype);
  Head h{gemm_layout(hidden),
         gemm_layout(weight),
         targets,
         bias,
         row_temperature,
         options,
         dtype,
         acc,
         hidden.size(0),
         hidden.size(1),
         weight.size(0),
         hidden.is_cuda(),
         current_stream(hidden),
         {}};
  if (bias) h.bias = to_contiguous(cast(*bias, scalar_type(acc)));
  h.plan = plan_chunks({h.rows, h.width, h.vocab, dtype, h.cuda, backward, chunk_bytes});
  return h;
}

// A block of rows of `source` as a matrix a GEMM takes: the tensor itself, or a float32 copy where the CPU must widen.
class Operand {
 public:
  Operand(const Tensor& source, const Head& head, int64_t max_rows) : source_(source), type_(head.dtype) {
    if (!head.cuda && head.dtype != head.acc) {
      buffer_ = empty({max_rows, source.size(1)}, ScalarType::Float, source);
      type_ = head.acc;
    }
  }
  Matrix rows(int64_t first, int64_t count, bool transposed = false) {
    if (!buffer_) {
      const auto* base = static_cast<const char*>(source_.const_data_ptr());
      return {base + first * row_stride(source_) * element_size(type_), row_stride(source_), transposed};
    }
    if (first != held_first_ || count != held_count_) {
      Tensor into = torch::stable::narrow(*buffer_, 0, 0, count);
      torch::stable::copy_(into, torch::stable::narrow(source_, 0, first, count));
      held_first_ = first;
      held_count_ = count;
    }
    return {buffer_->const_data_ptr(), source_.size(1), transposed};
  }
  DType type() const { return type_; }

 private:
  Tensor source_;
  OptTensor buffer_;
  DType type_;
  int64_t held_first_ = -1, held_count_ = -1;
};

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block)
    for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk)
      body(v, std::min(h.plan.vocab_block, h.vocab - v), r, std::min(h.plan.row_chunk, h.rows - r));
}

template <class S> LogitBlock<S> block_of(const Head& h, int64_t v, int64_t cols, int64_t r, int64_t rows) {
  LogitBlock<S> b = logit_block<S>(h.acc, rows, cols, h.vocab, h.targets, h.options, h.row_temperature);
  b.first_col = v;
  if (h.bias) b.transform.bias = data<S>(*h.bias) + v;
  advance_rows(b, r);
  return b;
}

template <class T> void advance(T*& pointer, int64_t by) {
  if (pointer) pointer += by;
}

template <class S> void forward_walk(const Head& h, int64_t outputs, const HeadOutputs& out) {
  FoldArgs<S> f;
  set_outputs(f, out, outputs, h.rows);
  const int64_t cols = h.plan.vocab_block;
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.acc), h.hidden);
  OptTensor state;
  if (cols < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  Operand hidden(h.hidden, h, h.plan.row_chunk), weight(h.weight, h, cols);
  S* z = mutable_data<S>(logits);
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    gemm(h.hidden, hidden.type(), n_rows, n_cols, h.width, hidden.rows(r, n_rows), weight.rows(v, n_cols, true), z, n_cols,
         false);
    FoldArgs<S> a = f;
    a.block = block_of<S>(h, v, n_cols, r, n_rows);
    a.logits = z;
    a.logits_map = {1, n_cols, 0};
    a.first = v == 0;
    a.last = v + n_cols == h.vocab;
    a.state = state ? mutable_data<S>(*state) + r : nullptr;
    a.state_stride = h.rows;
    for (S** p : {&a.logp, &a.out_entropy, &a.lse, &a.sum_sq_probs, &a.mean_logit, &a.row_max, &a.row_log2_sum}) advance(*p, r);
    advance(a.is_top1, r);
    run_fold(a, h.stream, h.cuda);
  });
}

struct HeadGrads {
  Tensor hidden, weight, bias;
};

template <class S> HeadGrads backward_walk(const Head& h, const GradArgs<S>& upstream, int64_t needs) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block;
  const bool direct = h.dtype == h.acc;  // gradients have the accumulator type: GEMMs write them in place
  const auto none = [&] { return empty({0}, acc, h.hidden); };  // one each: results may not share memory
  Tensor logits = empty({h.plan.row_chunk, cols}, acc, h.hidden);
  Tensor d_hidden = needs & kGradHidden ? empty({h.rows, h.width}, acc, h.hidden) : none();
  Tensor d_weight = needs & kGradWeight ? empty({h.vocab, h.width}, scalar_type(h.dtype), h.hidden) : none();
  Tensor d_weight_block = needs & kGradWeight && !direct ? empty({cols, h.width}, acc, h.hidden) : none();
  Tensor d_bias = needs & kGradBias ? empty({h.vocab}, acc, h.hidden) : none();
  // On CUDA the logits' gradient is narrowed in place to the inputs' type, so that tensor cores take it.
  const DType grad_type = h.cuda ? h.dtype : h.acc;
  Tensor ones = none();
  if (needs & kGradBias) {
    ones = empty({h.plan.row_chunk}, scalar_type(grad_type), h.hidden);
    ones = torch::stable::fill_(ones, 1.0);
  }
  Operand hidden(h.hidden, h, h.plan.row_chunk), weight(h.weight, h, cols);
  S* z = mutable_data<S>(logits);
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    const Matrix w = weight.rows(v, n_cols), x = hidden.rows(r, n_rows);
    gemm(h.hidden, hidden.type(), n_rows, n_cols, h.width, x, {w.data, w.stride, true}, z, n_cols, false);
    GradArgs<S> g = upstream;
    g.block = block_of<S>(h, v, n_cols, r, n_rows);
    g.logits = g.grad = z;
    g.logits_map = {1, n_cols, 0};
    const int64_t grad_stride = n_cols * int64_t(sizeof(S)) / element_size(grad_type);
    g.grad_dtype = grad_type;
    g.grad_map = {1, grad_stride, 0};
    for (const S** p : {&g.row_max, &g.row_log2_sum, &g.entropy, &g.g_logp, &g.g_entropy, &g.g_lse}) advance(*p, r);
    run_grad(g, h.stream, h.cuda);
    const Matrix dz{z, grad_stride, false}, dz_t{z, grad_stride, true};
    if (needs & kGradHidden)
      gemm(h.hidden, grad_type, n_rows, h.width, n_cols, dz, w, mutable_data<S>(d_hidden) + r * h.width, h.width, v > 0);
    if (needs & kGradWeight) {
      S* into = direct ? mutable_data<S>(d_weight) + v * h.width : mutable_data<S>(d_weight_block);
      gemm(h.hidden, grad_type, n_cols, h.width, n_rows, dz_t, x, into, h.width, r > 0);
      if (!direct && r + n_rows == h.rows) {
        Tensor rows = torch::stable::narrow(d_weight, 0, v, n_cols);
        torch::stable::copy_(rows, torch::stable::narrow(d_weight_block, 0, 0, n_cols));
      }
    }
    if (needs & kGradBias)
      gemm(h.hidden, grad_type, 1, n_cols, n_rows, {ones.const_data_ptr(), n_rows, false}, dz, mutable_data<S>(d_bias) + v,
           n_cols, r > 0);
  });
  return {needs & kGradHidden ? cast(d_hidden, scalar_type(h.dtype)) : d_hidden, d_weight, d_bias};
}

// Rows that count, as indices: on the CPU ignored rows leave before the GEMM.
Tensor active_rows(const Tensor& targets, int64_t ignored, int64_t ignore_index) {
  const int64_t rows = targets.size(0);
  Tensor active = empty({rows - ignored}, ScalarType::Long, targets);
  const int64_t* t = data<int64_t>(targets);
  int64_t* out = mutable_data<int64_t>(active);
  for (int64_t i = 0; i < rows; i++)
    if (t[i] != ignore_index) *out++ = i;
  return active;
}

OptTensor index_optional(const OptTensor& t, const Tensor& rows) { return t ? OptTensor(index_rows(*t, rows)) : t; }

}  // namespace

HeadOutputs linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                            OptTensor row_temperature, double temperature, double softcap, double logit_scale,
                            int64_t ignore_index, int64_t outputs, int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  check_head(hidden, weight, bias, chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, weight.size(0), ignore_index);
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  if (ignored == rows) return make_outputs(outputs, rows, acc, hidden, true);  // also N = 0

  const bool compact = ignored > 0;
  const Tensor active = compact ? active_rows(t, ignored, ignore_index) : t;
  const Head h = compact ? make_head(index_rows(hidden, active), weight, index_rows(t, active), bias,
                                     index_optional(tau, active), options, chunk_bytes, false)
                         : make_head(hidden, weight, t, bias, tau, options, chunk_bytes, false);
  const HeadOutputs out = make_outputs(outputs, h.rows, acc, hidden, false);
  acc == DType::f64 ? forward_walk<double>(h, outputs, out) : forward_walk<float>(h, outputs, out);
  return compact ? scatter_outputs(out, outputs, rows, active, acc) : out;
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                            OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                            const Tensor& stats, double temperature, double softcap,
                                                            double logit_scale, int64_t ignore_index, int64_t needs,
                                                            int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  check_head(hidden, weight, bias, chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0), vocab = weight.size(0), width = hidden.size(1);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, vocab, ignore_index);
  OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  Upstream up = checked_upstream(g_logp, g_entropy, g_lse, rows, acc, entropy, stats);
  if (ignored == rows) {
    const auto none = [&] { return empty({0}, scalar_type(acc), hidden); };
    return {needs & kGradHidden ? zeros({rows, width}, hidden.scalar_type(), hidden) : none(),
            needs & kGradWeight ? zeros({vocab, width}, hidden.scalar_type(), hidden) : none(),
            needs & kGradBias ? zeros({vocab}, bias->scalar_type(), hidden) : none()};
  }

  const auto run = [&](const Head& h, const Upstream& u, const Tensor& ent, const Tensor& st) {
    const auto walk = [&](auto zero) {
      GradArgs<decltype(zero)> g;
      set_upstream(g, u, ent, st, h.rows);
      return backward_walk<decltype(zero)>(h, g, needs);
    };
    return acc == DType::f64 ? walk(0.0) : walk(0.0f);
  };
  HeadGrads grads;
  if (ignored == 0) {
    // CUDA keeps ignored rows in place. The bias's gradient does not read hidden.
    const Tensor x = hidden.is_cuda() && needs & kGradWeight ? without_ignored_rows(hidden, t, ignore_index) : hidden;
    grads = run(make_head(x, weight, t, bias, tau, options, chunk_bytes, true), up, entropy, stats);
  } else {
    const Tensor active = active_rows(t, ignored, ignore_index);
    const Upstream u{index_optional(up.logp, active), index_optional(up.entropy, active), index_optional(up.lse, active)};
    Tensor st = empty({2, rows - ignored}, scalar_type(acc), hidden);
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(st, 0, k);
      torch::stable::copy_(into, index_rows(torch::stable::select(stats, 0, k), active));
    }
    grads = run(make_head(index_rows(hidden, active), weight, index_rows(t, active), bias, index_optional(tau, active), options,
                          chunk_bytes, true),
                u, up.entropy ? index_rows(entropy, active) : entropy, st);
    if (needs & kGradHidden) {
      Tensor full = zeros({rows, width}, hidden.scalar_type(), hidden);
      scatter_rows(full, active, grads.hidden);
      grads.hidden = full;
    }
  }
  if (needs & kGradBias) grads.bias = cast(grads.bias, bias->scalar_type());
  return {grads.hidden, grads.weight, grads.bias};
}

}  // namespace prefkern
