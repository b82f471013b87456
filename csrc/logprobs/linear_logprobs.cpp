// linear_logprobs: log-probabilities of targets under softmax(hidden @ weight.T), with no [N, V] tensor anywhere.
//
// The walk is the same on the CPU and on CUDA. Over blocks of the vocabulary (outer) and chunks of rows (inner): a vendor
// GEMM writes a block of logits in the accumulator type, and fold_logits folds it while it is still in cache. The
// backward recomputes each block, grad_logits turns it into d loss / d logits in place, and two GEMMs take it to the
// gradients. With the vocabulary outermost, a block of the weight's gradient is complete when its block ends, so its
// float32 accumulator is as small as the block.
#include <algorithm>

#include "logprobs/linear_head.h"

namespace prefkern {
namespace {

Head planned(Head h, int64_t chunk_bytes, bool backward) {
  // The columns of a block of lora_b are converted and added up as those of the weight are.
  const int64_t width = h.width + (h.lora ? h.lora->rank() : 0);
  // A forward that rounds takes the blocks of its backward. In others a GEMM may add up a logit in another order, and where that
  // crosses a rounding, the logits would differ by an ulp of the narrow type.
  h.plan = plan_chunks({h.rows, width, h.vocab, h.dtype, h.cuda, backward || h.rounded, chunk_bytes, element_size(h.logits)});
  return h;
}

void check_chunk_bytes(int64_t chunk_bytes) {
  check_value(chunk_bytes >= 0, "chunk_bytes is ", chunk_bytes, "; it must be positive, or None for the default");
}

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block)
    for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk)
      body(v, std::min(h.plan.vocab_block, h.vocab - v), r, std::min(h.plan.row_chunk, h.rows - r));
}

template <class S> void forward_walk(const Head& h, int64_t outputs, const HeadOutputs& out) {
  FoldArgs<S> f;
  set_outputs(f, out, outputs, h.rows);
  const int64_t cols = h.plan.vocab_block;
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.logits), h.hidden);
  OptTensor state;
  if (cols < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  HeadFactors factors(h);
  void* z = logits.mutable_data_ptr();
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    factors.write_logits(v, n_cols, r, n_rows, z);
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
    if (h.keep) {
      mask_block(h, a.block, r, z, a.mean_logit);
      a.mean_logit = nullptr;  // to the fold it would be -inf
    }
    run_fold(a, h.stream, h.cuda);
  });
}

char* row_of(Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.mutable_data_ptr()) + row * matrix.size(1) * element_size(float_dtype(matrix, "gradient"));
}

// The gradient of a matrix with a row per token of the vocabulary, block by block. GEMMs write it in place where one of them
// makes a block of it, or where it has the accumulator type; else it is added up in the accumulator type first.
class VocabGrad {
 public:
  VocabGrad(const Head& h, int64_t width, bool wanted)
      : h_(h), wanted_(wanted), direct_(h.dtype == h.acc || (h.cuda && h.plan.row_chunk >= h.rows)) {
    if (!wanted) return;
    grad_ = empty({h.vocab, width}, scalar_type(h.dtype), h.hidden);
    if (!direct_) block_ = empty({h.plan.vocab_block, width}, scalar_type(h.acc), h.hidden);
  }
  // scale dz_t x, with dz_t [cols, rows] and x [rows, width].
  void add(DType type, int64_t v, int64_t cols, int64_t r, int64_t rows, const Matrix& dz_t, const Matrix& x,
           double scale = 1) {
    if (!wanted_) return;
    const int64_t width = grad_->size(1);
    gemm(h_.hidden, type, cols, width, rows, dz_t, x, direct_ ? row_of(*grad_, v) : row_of(*block_, 0),
         direct_ ? h_.dtype : h_.acc, width, r > 0, scale);
    if (direct_ || r + rows < h_.rows) return;
    Tensor done = torch::stable::narrow(*grad_, 0, v, cols);
    torch::stable::copy_(done, torch::stable::narrow(*block_, 0, 0, cols));
  }
  const OptTensor& grad() const { return grad_; }

 private:
  const Head& h_;
  bool wanted_, direct_;
  OptTensor grad_, block_;
};

// Without elements where not asked for.
struct HeadGrads {
  Tensor hidden, weight, bias, lora_a, lora_b;
};

template <class S> HeadGrads backward_walk(const Head& h, const GradArgs<S>& upstream, int64_t needs) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block, rank = h.lora ? h.lora->rank() : 0;
  const double lora_scale = h.lora ? h.lora->scale : 0;
  // The gradient of hidden, too, is one GEMM if the vocabulary is one block, and nothing comes from a low-rank update.
  const DType hidden_type = h.cuda && cols >= h.vocab && !h.lora ? h.dtype : h.acc;
  const auto none = [&] { return empty({0}, acc, h.hidden); };  // one each: results may not share memory
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.logits), h.hidden);
  Tensor d_hidden = needs & kGradHidden ? empty({h.rows, h.width}, scalar_type(hidden_type), h.hidden) : none();
  VocabGrad d_weight(h, h.width, needs & kGradWeight), d_lora_b(h, rank, needs & kGradLoraB);
  Tensor d_bias = needs & kGradBias ? empty({h.vocab}, acc, h.hidden) : none();
  // Of t = h a^T, through which hidden and lora_a get their part at the end.
  const bool needs_t = h.lora && needs & (kGradHidden | kGradLoraA);
  Tensor d_t = needs_t ? empty({h.rows, rank}, acc, h.hidden) : none();
  // On CUDA the logits' gradient is narrowed in place to the inputs' type, so that tensor cores take it.
  const DType grad_type = h.cuda ? h.dtype : h.acc;
  Tensor ones = none();
  if (needs & kGradBias && !h.cuda) {
    ones = empty({h.plan.row_chunk}, scalar_type(grad_type), h.hidden);
    ones = torch::stable::fill_(ones, 1.0);
  }
  HeadFactors factors(h);
  void* z = logits.mutable_data_ptr();
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    factors.write_logits(v, n_cols, r, n_rows, z);
    GradArgs<S> g = upstream;
    g.block = block_of<S>(h, v, n_cols, r, n_rows);
    mask_block(h, g.block, r, z);
    g.logits = g.grad = z;
    g.logits_map = {1, n_cols, 0};
    const int64_t grad_stride = n_cols * element_size(h.logits) / element_size(grad_type);
    g.grad_dtype = grad_type;
    g.grad_map = {1, grad_stride, 0};
    for (const S** p : {&g.row_max, &g.row_log2_sum, &g.entropy, &g.g_logp, &g.g_entropy, &g.g_lse}) advance(*p, r);
    if (needs & kGradBias && h.cuda) bias_on_cuda(g, mutable_data<S>(d_bias) + v, r > 0, h.stream);
    run_grad(g, h.stream, h.cuda);
    const Matrix dz{z, grad_stride, false}, dz_t{z, grad_stride, true};
    if (needs & kGradHidden)
      gemm(h.hidden, grad_type, n_rows, h.width, n_cols, dz, factors.weight(v, n_cols), row_of(d_hidden, r), hidden_type,
           h.width, v > 0);
    d_weight.add(grad_type, v, n_cols, r, n_rows, dz_t, factors.hidden(r, n_rows));
    if (needs_t)
      gemm(h.hidden, grad_type, n_rows, rank, n_cols, dz, factors.lora_b(v, n_cols), row_of(d_t, r), h.acc, rank, v > 0,
           lora_scale);
    if (needs & kGradLoraB) d_lora_b.add(grad_type, v, n_cols, r, n_rows, dz_t, factors.lora_t(r), lora_scale);
    if (needs & kGradBias && !h.cuda)
      gemm(h.hidden, grad_type, 1, n_cols, n_rows, {ones.const_data_ptr(), n_rows, false}, dz, mutable_data<S>(d_bias) + v,
           h.acc, n_cols, r > 0);
  });

  Tensor d_lora_a = none();
  if (needs_t) {
    d_t = cast(d_t, scalar_type(grad_type));
    if (needs & kGradHidden)
      gemm(h.hidden, grad_type, h.rows, h.width, rank, {d_t.const_data_ptr(), rank, false}, factors.lora_a(),
           row_of(d_hidden, 0), hidden_type, h.width, true);
    if (needs & kGradLoraA) {
      d_lora_a = empty({rank, h.width}, acc, h.hidden);
      for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk) {
        const int64_t n_rows = std::min(h.plan.row_chunk, h.rows - r);
        gemm(h.hidden, grad_type, rank, h.width, n_rows, {row_of(d_t, r), rank, true}, factors.hidden(r, n_rows),
             row_of(d_lora_a, 0), h.acc, h.width, r > 0);
      }
      d_lora_a = cast(d_lora_a, scalar_type(h.dtype));
    }
  }
  return {needs & kGradHidden ? cast(d_hidden, scalar_type(h.dtype)) : d_hidden, d_weight.grad() ? *d_weight.grad() : none(),
          d_bias, d_lora_a, d_lora_b.grad() ? *d_lora_b.grad() : none()};
}

std::optional<KeptTokens> index_optional(const std::optional<KeptTokens>& keep, const Tensor& rows) {
  return keep ? std::optional(KeptTokens{index_rows(keep->begin, rows), index_rows(keep->end, rows), keep->ids}) : keep;
}

// The upstream gradient of log-probs, without those of targets that are not kept.
OptTensor of_kept_targets(const OptTensor& g, const std::optional<KeptTokens>& keep, const Tensor& targets) {
  if (!g || !keep) return g;
  const Tensor out = empty({g->size(0)}, g->scalar_type(), *g);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    run_kept_upstream(
        KeptUpstreamArgs<S>{g->size(0), data<int64_t>(targets), keep->from_row(0), data<S>(*g), mutable_data<S>(out)},
        current_stream(*g), g->is_cuda());
  };
  g->scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return out;
}

HeadOutputs forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
                    const OptTensor& row_temperature, const HeadOptions& options, const HeadExtras& extras, int64_t outputs,
                    int64_t chunk_bytes) {
  check_head(hidden, weight, bias);
  check_extras(hidden, weight, extras);
  check_chunk_bytes(chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, weight.size(0), options.ignore_index);
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  const std::optional<KeptTokens> keep = checked_keep(extras, hidden, t, weight.size(0), options.ignore_index);
  if (ignored == rows) return make_outputs(outputs, rows, acc, hidden, true);  // also N = 0

  const bool compact = ignored > 0;
  const Tensor active = compact ? active_rows(t, ignored, options.ignore_index) : t;
  Head h = planned(compact ? make_head(index_rows(hidden, active), weight, index_rows(t, active), bias,
                                       index_optional(tau, active), options, extras)
                           : make_head(hidden, weight, t, bias, tau, options, extras),
                   chunk_bytes, false);
  h.keep = compact ? index_optional(keep, active) : keep;
  const HeadOutputs out = make_outputs(outputs, h.rows, acc, hidden, false);
  acc == DType::f64 ? forward_walk<double>(h, outputs, out) : forward_walk<float>(h, outputs, out);
  return compact ? scatter_outputs(out, outputs, rows, active, acc) : out;
}

struct UpstreamInputs {
  const OptTensor &logp, &entropy, &lse;
};

HeadGrads backward(const UpstreamInputs& g, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                   const OptTensor& bias, const OptTensor& row_temperature, const Tensor& entropy, const Tensor& stats,
                   const HeadOptions& options, const HeadExtras& extras, int64_t needs, int64_t chunk_bytes) {
  check_head(hidden, weight, bias);
  check_extras(hidden, weight, extras);
  check_chunk_bytes(chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, weight.size(0), options.ignore_index);
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  const std::optional<KeptTokens> keep = checked_keep(extras, hidden, t, weight.size(0), options.ignore_index);
  Upstream up = checked_upstream(g.logp, g.entropy, g.lse, rows, acc, entropy, stats);
  if (ignored == rows) {
    const auto zero = [&](int64_t bit, const OptTensor& like, ScalarType type) {
      if (!(needs & bit) || !like) return empty({0}, scalar_type(acc), hidden);
      return like->dim() == 1 ? zeros({like->size(0)}, type, hidden) : zeros({like->size(0), like->size(1)}, type, hidden);
    };
    const ScalarType own = hidden.scalar_type();
    return {zero(kGradHidden, hidden, own), zero(kGradWeight, weight, own),
            zero(kGradBias, bias, bias ? bias->scalar_type() : own), zero(kGradLoraA, extras.lora_a, own),
            zero(kGradLoraB, extras.lora_b, own)};
  }

  up.logp = of_kept_targets(up.logp, keep, t);
  const auto run = [&](Head h, const std::optional<KeptTokens>& kept, const Upstream& u, const Tensor& ent, const Tensor& st) {
    h.keep = kept;
    const auto walk = [&](auto zero) {
      GradArgs<decltype(zero)> args;
      set_upstream(args, u, ent, st, h.rows);
      return backward_walk<decltype(zero)>(h, args, needs);
    };
    return acc == DType::f64 ? walk(0.0) : walk(0.0f);
  };
  HeadGrads grads;
  if (ignored == 0) {
    // CUDA keeps ignored rows in place. The bias's gradient does not read hidden.
    const bool reads_hidden = needs & (kGradWeight | kGradLoraA | kGradLoraB);
    const Tensor x = hidden.is_cuda() && reads_hidden ? without_ignored_rows(hidden, t, options.ignore_index) : hidden;
    grads = run(planned(make_head(x, weight, t, bias, tau, options, extras), chunk_bytes, true), keep, up, entropy, stats);
  } else {
    const Tensor active = active_rows(t, ignored, options.ignore_index);
    const Upstream u{index_optional(up.logp, active), index_optional(up.entropy, active), index_optional(up.lse, active)};
    Tensor st = empty({2, rows - ignored}, scalar_type(acc), hidden);
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(st, 0, k);
      torch::stable::copy_(into, index_rows(torch::stable::select(stats, 0, k), active));
    }
    grads = run(planned(make_head(index_rows(hidden, active), weight, index_rows(t, active), bias, index_optional(tau, active),
                                  options, extras),
                        chunk_bytes, true),
                index_optional(keep, active), u, up.entropy ? index_rows(entropy, active) : entropy, st);
    if (needs & kGradHidden) {
      Tensor full = zeros({rows, width}, hidden.scalar_type(), hidden);
      scatter_rows(full, active, grads.hidden);
      grads.hidden = full;
    }
  }
  if (needs & kGradBias) grads.bias = cast(grads.bias, bias->scalar_type());
  return grads;
}

}  // namespace

HeadOutputs linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                            OptTensor row_temperature, double temperature, double softcap, double logit_scale,
                            int64_t ignore_index, int64_t outputs, int64_t chunk_bytes) {
  return forward(hidden, weight, targets, bias, row_temperature, {temperature, softcap, logit_scale, ignore_index}, {}, outputs,
                 chunk_bytes);
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                            OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                            const Tensor& stats, double temperature, double softcap,
                                                            double logit_scale, int64_t ignore_index, int64_t needs,
                                                            int64_t chunk_bytes) {
  const HeadGrads g = backward({g_logp, g_entropy, g_lse}, hidden, weight, targets, bias, row_temperature, entropy, stats,
                               {temperature, softcap, logit_scale, ignore_index}, {}, needs, chunk_bytes);
  return {g.hidden, g.weight, g.bias};
}

HeadOutputs linear_logprobs_ext(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                                OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets,
                                OptTensor keep_ids, double temperature, double softcap, double logit_scale,
                                int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t outputs,
                                int64_t chunk_bytes) {
  return forward(hidden, weight, targets, bias, row_temperature, {temperature, softcap, logit_scale, ignore_index},
                 {lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids}, outputs, chunk_bytes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_ext_backward(
    OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    OptTensor bias, OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets, OptTensor keep_ids,
    const Tensor& entropy, const Tensor& stats, double temperature, double softcap, double logit_scale, int64_t ignore_index,
    double lora_scale, int64_t logits_dtype, int64_t needs, int64_t chunk_bytes) {
  if (!lora_a) needs &= ~int64_t(kGradLoraA | kGradLoraB);
  const HeadGrads g = backward({g_logp, g_entropy, g_lse}, hidden, weight, targets, bias, row_temperature, entropy, stats,
                               {temperature, softcap, logit_scale, ignore_index},
                               {lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids}, needs, chunk_bytes);
  return {g.hidden, g.weight, g.bias, g.lora_a, g.lora_b};
}

}  // namespace prefkern
