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
  h.plan = plan_chunks({h.rows, h.width, h.vocab, h.dtype, h.cuda, backward, chunk_bytes});
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
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.acc), h.hidden);
  OptTensor state;
  if (cols < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  Operand hidden(h.hidden, h, h.plan.row_chunk), weight(h.weight, h, cols);
  S* z = mutable_data<S>(logits);
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    gemm(h.hidden, hidden.type(), n_rows, n_cols, h.width, hidden.rows(r, n_rows), weight.rows(v, n_cols, true), z, h.acc,
         n_cols, false);
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

char* row_of(Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.mutable_data_ptr()) + row * matrix.size(1) * element_size(float_dtype(matrix, "gradient"));
}

struct HeadGrads {
  Tensor hidden, weight, bias;
};

template <class S> HeadGrads backward_walk(const Head& h, const GradArgs<S>& upstream, int64_t needs) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block;
  // Gradients that are one GEMM, block by block, or that have the accumulator type: GEMMs write them in place. The others are
  // added up in the accumulator type first.
  const bool weight_direct = h.dtype == h.acc || (h.cuda && h.plan.row_chunk >= h.rows);
  const DType hidden_type = h.cuda && cols >= h.vocab ? h.dtype : h.acc;
  const DType weight_type = weight_direct ? h.dtype : h.acc;
  const auto none = [&] { return empty({0}, acc, h.hidden); };  // one each: results may not share memory
  Tensor logits = empty({h.plan.row_chunk, cols}, acc, h.hidden);
  Tensor d_hidden = needs & kGradHidden ? empty({h.rows, h.width}, scalar_type(hidden_type), h.hidden) : none();
  Tensor d_weight = needs & kGradWeight ? empty({h.vocab, h.width}, scalar_type(h.dtype), h.hidden) : none();
  Tensor d_weight_block = needs & kGradWeight && !weight_direct ? empty({cols, h.width}, acc, h.hidden) : none();
  Tensor d_bias = needs & kGradBias ? empty({h.vocab}, acc, h.hidden) : none();
  // On CUDA the logits' gradient is narrowed in place to the inputs' type, so that tensor cores take it.
  const DType grad_type = h.cuda ? h.dtype : h.acc;
  Tensor ones = none();
  if (needs & kGradBias && !h.cuda) {
    ones = empty({h.plan.row_chunk}, scalar_type(grad_type), h.hidden);
    ones = torch::stable::fill_(ones, 1.0);
  }
  Operand hidden(h.hidden, h, h.plan.row_chunk), weight(h.weight, h, cols);
  S* z = mutable_data<S>(logits);
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    const Matrix w = weight.rows(v, n_cols), x = hidden.rows(r, n_rows);
    gemm(h.hidden, hidden.type(), n_rows, n_cols, h.width, x, {w.data, w.stride, true}, z, h.acc, n_cols, false);
    GradArgs<S> g = upstream;
    g.block = block_of<S>(h, v, n_cols, r, n_rows);
    g.logits = g.grad = z;
    g.logits_map = {1, n_cols, 0};
    const int64_t grad_stride = n_cols * int64_t(sizeof(S)) / element_size(grad_type);
    g.grad_dtype = grad_type;
    g.grad_map = {1, grad_stride, 0};
    for (const S** p : {&g.row_max, &g.row_log2_sum, &g.entropy, &g.g_logp, &g.g_entropy, &g.g_lse}) advance(*p, r);
    if (needs & kGradBias && h.cuda) bias_on_cuda(g, mutable_data<S>(d_bias) + v, r > 0, h.stream);
    run_grad(g, h.stream, h.cuda);
    const Matrix dz{z, grad_stride, false}, dz_t{z, grad_stride, true};
    if (needs & kGradHidden)
      gemm(h.hidden, grad_type, n_rows, h.width, n_cols, dz, w, row_of(d_hidden, r), hidden_type, h.width, v > 0);
    if (needs & kGradWeight) {
      void* into = weight_direct ? row_of(d_weight, v) : row_of(d_weight_block, 0);
      gemm(h.hidden, grad_type, n_cols, h.width, n_rows, dz_t, x, into, weight_type, h.width, r > 0);
      if (!weight_direct && r + n_rows == h.rows) {
        Tensor rows = torch::stable::narrow(d_weight, 0, v, n_cols);
        torch::stable::copy_(rows, torch::stable::narrow(d_weight_block, 0, 0, n_cols));
      }
    }
    if (needs & kGradBias && !h.cuda)
      gemm(h.hidden, grad_type, 1, n_cols, n_rows, {ones.const_data_ptr(), n_rows, false}, dz, mutable_data<S>(d_bias) + v,
           h.acc, n_cols, r > 0);
  });
  return {needs & kGradHidden ? cast(d_hidden, scalar_type(h.dtype)) : d_hidden, d_weight, d_bias};
}

}  // namespace

HeadOutputs linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                            OptTensor row_temperature, double temperature, double softcap, double logit_scale,
                            int64_t ignore_index, int64_t outputs, int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  check_head(hidden, weight, bias);
  check_chunk_bytes(chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, weight.size(0), ignore_index);
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  if (ignored == rows) return make_outputs(outputs, rows, acc, hidden, true);  // also N = 0

  const bool compact = ignored > 0;
  const Tensor active = compact ? active_rows(t, ignored, ignore_index) : t;
  const Head h = planned(
      compact ? make_head(index_rows(hidden, active), weight, index_rows(t, active), bias, index_optional(tau, active), options)
              : make_head(hidden, weight, t, bias, tau, options),
      chunk_bytes, false);
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
  check_head(hidden, weight, bias);
  check_chunk_bytes(chunk_bytes);
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
    grads = run(planned(make_head(x, weight, t, bias, tau, options), chunk_bytes, true), up, entropy, stats);
  } else {
    const Tensor active = active_rows(t, ignored, ignore_index);
    const Upstream u{index_optional(up.logp, active), index_optional(up.entropy, active), index_optional(up.lse, active)};
    Tensor st = empty({2, rows - ignored}, scalar_type(acc), hidden);
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(st, 0, k);
      torch::stable::copy_(into, index_rows(torch::stable::select(stats, 0, k), active));
    }
    grads = run(planned(make_head(index_rows(hidden, active), weight, index_rows(t, active), bias, index_optional(tau, active),
                                  options),
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
