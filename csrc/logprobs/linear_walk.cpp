// The walk is the same on the CPU and on CUDA. Over blocks of the vocabulary (outer) and chunks of rows (inner): a vendor
// GEMM writes a block of logits in the accumulator type, and fold_logits folds it while it is still in cache. The
// backward recomputes each block, grad_logits turns it into d loss / d logits in place, and two GEMMs take it to the
// gradients. With the vocabulary outermost, a block of the weight's gradient is complete when its block ends, so its
// float32 accumulator is as small as the block.
#include "logprobs/linear_walk.h"

#include <algorithm>
#include <limits>

#include "logprobs/hopper_backward.h"
#include "logprobs/hopper_walk.h"

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

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block)
    for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk)
      body(v, std::min(h.plan.vocab_block, h.vocab - v), r, std::min(h.plan.row_chunk, h.rows - r));
}

// Writes the outputs, or where there are none leaves the rows' state.
template <class S> void forward_walk(const Head& h, int64_t outputs, const HeadOutputs* out, OptTensor state) {
  if (takes_hopper(h, outputs)) return hopper_walk(h, outputs, out, state);
  FoldArgs<S> f;
  out ? set_outputs(f, *out, outputs, h.rows) : set_sums(f, outputs);
  const int64_t cols = h.plan.vocab_block;
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.logits), h.hidden);
  if (!state && cols < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  HeadFactors factors(h);
  void* z = logits.mutable_data_ptr();
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    factors.write_logits(v, n_cols, r, n_rows, z);
    FoldArgs<S> a = f;
    a.block = block_of<S>(h, v, n_cols, r, n_rows);
    a.logits = z;
    a.logits_map = {1, n_cols, 0};
    a.first = v == 0;
    a.last = out && v + n_cols == h.vocab;
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

template <class S> HeadGrads backward_walk(const Head& h, const GradArgs<S>& upstream, int64_t needs) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block, rank = h.lora ? h.lora->rank() : 0;
  const double lora_scale = h.lora ? h.lora->scale : 0;
  // The gradient of hidden, too, is one GEMM if the vocabulary is one block, and nothing comes from a low-rank update or from
  // other ranges.
  const DType hidden_type = h.cuda && cols >= h.vocab && !h.lora && !h.range ? h.dtype : h.acc;
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
  if (needs & kGradHidden && !h.range) d_hidden = cast(d_hidden, scalar_type(h.dtype));
  return {d_hidden, d_weight.grad() ? *d_weight.grad() : none(), d_bias, d_lora_a, d_lora_b.grad() ? *d_lora_b.grad() : none()};
}

std::optional<KeptTokens> index_kept(const std::optional<KeptTokens>& keep, const Tensor& rows) {
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

// A range without columns is checked as one of a single column.
void check_range(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const VocabRange& range) {
  const bool none = weight.dim() == 2 && weight.size(0) == 0;
  check_head(hidden, none ? zeros({1, weight.size(1)}, weight.scalar_type(), weight) : weight, none ? OptTensor() : bias);
  check_value(!none || !bias || (bias->dim() == 1 && bias->size(0) == 0), "bias has shape ",
              bias ? shape_text(*bias) : std::string(), "; expected [0]");
  check_value(range.vocab > 0, "vocab is ", range.vocab, "; a vocabulary needs at least one token");
  check_value(range.first_col >= 0 && range.first_col <= range.vocab - weight.size(0), "weight has ", weight.size(0),
              " rows from token ", range.first_col, " on, but the vocabulary has ", range.vocab);
}

// [7, N]: the rows before any column was met.
Tensor empty_state(int64_t rows, DType acc, const Tensor& like) {
  Tensor state = zeros({kRowStateArrays, rows}, scalar_type(acc), like);
  const auto fill = [&](int64_t array, double value) {
    Tensor into = torch::stable::select(state, 0, array);
    torch::stable::fill_(into, value);
  };
  fill(0, -std::numeric_limits<double>::infinity());
  fill(5, std::numeric_limits<double>::quiet_NaN());
  fill(6, -std::numeric_limits<double>::infinity());
  return state;
}

// What the arguments were found to be.
struct Checked {
  Tensor targets;
  OptTensor row_temperature;
  std::optional<KeptTokens> keep;
  DType acc;
  int64_t rows;
  bool nothing;      // counts, or there are no columns
  OptTensor active;  // the rows that count, where not all do and somebody may ask
};

Checked check(const HeadInputs& in) {
  in.range ? check_range(in.hidden, in.weight, in.bias, *in.range) : check_head(in.hidden, in.weight, in.bias);
  check_extras(in.hidden, in.weight, in.extras);
  check_value(in.chunk_bytes >= 0, "chunk_bytes is ", in.chunk_bytes, "; it must be positive, or None for the default");
  check_head_options(in.options);
  Checked c;
  c.rows = in.hidden.size(0);
  c.acc = accumulator(float_dtype(in.hidden, "hidden"));
  const int64_t columns = in.weight.size(0), vocab = in.range ? in.range->vocab : columns;
  const auto [targets, ignored] = checked_targets(in.targets, in.hidden, "hidden", c.rows, vocab, in.options.ignore_index);
  c.targets = targets;
  c.row_temperature = checked_row_temperature(in.row_temperature, in.hidden, "hidden", c.rows, c.acc);
  c.keep = checked_keep(in.extras, in.hidden, targets, vocab, in.options.ignore_index);
  c.nothing = ignored == c.rows || columns == 0;  // also N = 0
  if (ignored > 0 && !c.nothing) c.active = active_rows(targets, ignored, in.options.ignore_index);
  return c;
}

// The head of the rows that count.
Head head_of(const HeadInputs& in, const Checked& c, const Tensor& hidden, bool backward) {
  Head h = c.active ? make_head(index_rows(hidden, *c.active), in.weight, index_rows(c.targets, *c.active), in.bias,
                                index_optional(c.row_temperature, *c.active), in.options, in.extras)
                    : make_head(hidden, in.weight, c.targets, in.bias, c.row_temperature, in.options, in.extras);
  h.keep = c.active ? index_kept(c.keep, *c.active) : c.keep;
  h.range = in.range;
  return planned(h, in.chunk_bytes, backward);
}

}  // namespace

HeadOutputs head_forward(const HeadInputs& in, int64_t outputs) {
  const OnDevice guard(in.hidden);
  const Checked c = check(in);
  if (c.nothing) return make_outputs(outputs, c.rows, c.acc, in.hidden, true);
  const Head h = head_of(in, c, in.hidden, false);
  const HeadOutputs out = make_outputs(outputs, h.rows, c.acc, in.hidden, false);
  c.acc == DType::f64 ? forward_walk<double>(h, outputs, &out, {}) : forward_walk<float>(h, outputs, &out, {});
  return c.active ? scatter_outputs(out, outputs, c.rows, *c.active, c.acc) : out;
}

Tensor head_state(const HeadInputs& in, int64_t outputs) {
  const OnDevice guard(in.hidden);
  const Checked c = check(in);
  if (c.nothing) return empty_state(c.rows, c.acc, in.hidden);
  const Head h = head_of(in, c, in.hidden, false);
  const Tensor state = empty({kRowStateArrays, h.rows}, scalar_type(c.acc), in.hidden);
  c.acc == DType::f64 ? forward_walk<double>(h, outputs, nullptr, state) : forward_walk<float>(h, outputs, nullptr, state);
  if (!c.active) return state;
  const Tensor all = empty_state(c.rows, c.acc, in.hidden);
  for (int64_t k = 0; k < kRowStateArrays; k++) {
    Tensor into = torch::stable::select(all, 0, k);
    scatter_rows(into, *c.active, torch::stable::select(state, 0, k));
  }
  return all;
}

HeadGrads head_backward(const HeadInputs& in, const UpstreamInputs& upstream, const Tensor& entropy, const Tensor& stats,
                        int64_t needs) {
  const OnDevice guard(in.hidden);
  const Checked c = check(in);
  const ScalarType own = in.hidden.scalar_type(), acc = scalar_type(c.acc), hidden_type = in.range ? acc : own;
  Upstream up = checked_upstream(upstream.logp, upstream.entropy, upstream.lse, c.rows, c.acc, entropy, stats);
  if (c.nothing) {
    const auto zero = [&](int64_t bit, const OptTensor& like, ScalarType type) {
      if (!(needs & bit) || !like) return empty({0}, acc, in.hidden);
      return like->dim() == 1 ? zeros({like->size(0)}, type, in.hidden)
                              : zeros({like->size(0), like->size(1)}, type, in.hidden);
    };
    return {zero(kGradHidden, in.hidden, hidden_type), zero(kGradWeight, in.weight, own),
            zero(kGradBias, in.bias, in.bias ? in.bias->scalar_type() : own), zero(kGradLoraA, in.extras.lora_a, own),
            zero(kGradLoraB, in.extras.lora_b, own)};
  }

  up.logp = of_kept_targets(up.logp, c.keep, c.targets);
  Tensor ent = entropy, st = stats, x = in.hidden;
  if (c.active) {
    const Tensor& active = *c.active;
    if (up.entropy) ent = index_rows(entropy, active);
    st = empty({2, active.size(0)}, acc, in.hidden);
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(st, 0, k);
      torch::stable::copy_(into, index_rows(torch::stable::select(stats, 0, k), active));
    }
    up = {index_optional(up.logp, active), index_optional(up.entropy, active), index_optional(up.lse, active)};
  } else if (in.hidden.is_cuda() && needs & (kGradWeight | kGradLoraA | kGradLoraB)) {
    // CUDA keeps ignored rows in place. The bias's gradient does not read hidden.
    x = without_ignored_rows(in.hidden, c.targets, in.options.ignore_index);
  }
  const Head h = head_of(in, c, x, true);
  const auto walk = [&](auto zero) {
    GradArgs<decltype(zero)> args;
    set_upstream(args, up, ent, st, h.rows);
    if constexpr (sizeof(zero) == sizeof(float))
      if (takes_compact_backward(h)) return compact_backward(h, args, needs);
    return backward_walk<decltype(zero)>(h, args, needs);
  };
  HeadGrads grads = c.acc == DType::f64 ? walk(0.0) : walk(0.0f);
  if (c.active && needs & kGradHidden) {
    Tensor full = zeros({c.rows, in.hidden.size(1)}, hidden_type, in.hidden);
    scatter_rows(full, *c.active, grads.hidden);
    grads.hidden = full;
  }
  if (needs & kGradBias) grads.bias = cast(grads.bias, in.bias->scalar_type());
  return grads;
}

}  // namespace prefkern
