// The backward of the walk in linear_walk.cpp: it computes the logits of each block again, or reads those that were kept.
#include <algorithm>
#include <array>

#include "logprobs/linear_call.h"

namespace prefkern {
namespace {

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

// Logits of the forward, and which of their rows are the head's, if not all.
struct KeptRows {
  KeptLogits logits;
  OptTensor index;
};

template <class S>
HeadGrads backward_walk(const Head& h, const GradArgs<S>& upstream, int64_t needs, const std::optional<KeptRows>& kept) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block, rank = h.lora ? h.lora->rank() : 0;
  const double lora_scale = h.lora ? h.lora->scale : 0;
  // The gradient of hidden, too, is one GEMM if the vocabulary is one block, and nothing comes from a low-rank update or from
  // other ranges.
  const DType hidden_type = h.cuda && cols >= h.vocab && !h.lora && !h.range ? h.dtype : h.acc;
  const auto none = [&] { return empty({0}, acc, h.hidden); };  // one each: results may not share memory
  const Tensor logits = empty({h.plan.row_chunk * cols}, scalar_type(h.logits), h.hidden);
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
    if (!kept) factors.write_logits(v, n_cols, r, n_rows, z);
    else kept->logits.read(v, n_cols, r, n_rows, kept->index, logits);
    if (kept && v == 0 && needs & kGradLoraB) factors.write_lora_t(r, n_rows);
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

// Leaves of the rows that count those that contribute to a backward. True if others may stay between them: on CUDA; and where
// rounded logits are computed again, because a GEMM of other rows than the forward's may round one of them to its neighbour.
bool keep_active(Checked& c, const HeadInputs& in, const Upstream& up, bool kept) {
  const ActiveRows active = active_rows_of(c.targets, in.options.ignore_index, up);
  c.targets = active.targets;
  c.nothing = active.count == 0;
  if (in.hidden.is_cuda()) return true;
  if (in.extras.logits_dtype != 0 && !kept) return active.index.has_value();
  c.active = active.index;
  return false;
}

// Where the rows of `some` are among those of `all`; both ascend. Null: everywhere.
OptTensor places(const OptTensor& some, const OptTensor& all) {
  if (!some || !all) return some;
  const int64_t n = some->size(0);
  if (n == all->size(0)) return std::nullopt;
  const Tensor out = empty({n}, ScalarType::Long, *some);
  const auto *wanted = data<int64_t>(*some), *from = data<int64_t>(*all);
  for (int64_t k = 0, at = 0; k < n; k++) {
    while (from[at] != wanted[k]) at++;
    mutable_data<int64_t>(out)[k] = at;
  }
  return out;
}

void check_kept(const Tensor& kept, const Head& h, int64_t rows) {
  check_type(kept.scalar_type() == scalar_type(kept_type(h)), "logits has dtype ", dtype_name(kept.scalar_type()),
             "; expected ", dtype_name(scalar_type(kept_type(h))));
  check_same_device(kept, "logits", h.hidden, "hidden");
  check_value(kept.dim() == 1 && kept.is_contiguous() && kept.size(0) == rows * h.vocab, "logits has shape ", shape_text(kept),
              "; expected [", rows * h.vocab, "], contiguous");
}

}  // namespace

HeadGrads head_backward(const HeadInputs& in, const UpstreamInputs& upstream, const Tensor& entropy, const Tensor& stats,
                        int64_t needs, const OptTensor& kept) {
  const OnDevice guard(in.hidden);
  Checked c = check(in);
  const ScalarType own = in.hidden.scalar_type(), acc = scalar_type(c.acc), hidden_type = in.range ? acc : own;
  Upstream up = checked_upstream(upstream.logp, upstream.entropy, upstream.lse, c.rows, c.acc, entropy, stats);
  const OptTensor counted = c.active;  // as in the forward
  const int64_t counted_rows = counted ? counted->size(0) : c.rows;
  bool in_place = false;
  if (!c.nothing) {
    up.logp = of_kept_targets(up.logp, c.keep, c.targets);
    in_place = keep_active(c, in, up, kept.has_value());
  }
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

  Tensor ent = entropy, st = stats, x = in.hidden;
  // Inactive rows that keep their places have a gradient of 0. The bias's gradient does not read hidden.
  if (in_place && needs & (kGradWeight | kGradLoraA | kGradLoraB))
    x = without_ignored_rows(in.hidden, c.targets, in.options.ignore_index);
  if (c.active) {
    const Tensor& active = *c.active;
    if (up.entropy) ent = index_rows(entropy, active);
    st = empty({2, active.size(0)}, acc, in.hidden);
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(st, 0, k);
      torch::stable::copy_(into, index_rows(torch::stable::select(stats, 0, k), active));
    }
    up = {index_optional(up.logp, active), index_optional(up.entropy, active), index_optional(up.lse, active)};
  }
  Head h = head_of(in, c, x, true);
  std::optional<KeptRows> rows;
  if (kept) {
    check_kept(*kept, h, c.rows);
    h.plan = plan_of(h, counted_rows, in.chunk_bytes, true);  // the blocks of the forward
    h.plan.row_chunk = std::min(h.plan.row_chunk, h.rows);
    rows = KeptRows{KeptLogits(h, counted_rows, *kept), places(c.active, counted)};
  }
  const auto walk = [&](auto zero) {
    GradArgs<decltype(zero)> args;
    set_upstream(args, up, ent, st, h.rows);
    return backward_walk<decltype(zero)>(h, args, needs, rows);
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

Tensor head_row_backward(const UpstreamInputs& upstream, const Tensor& gradients, int64_t outputs, DType type) {
  const DType acc = float_dtype(gradients, "gradients");
  check_value(gradients.is_cpu(), "u is saved on the CPU only");
  check_type(acc == accumulator(type) && (type == DType::f64 || acc == DType::f32), "gradients has dtype ",
             dtype_name(gradients.scalar_type()), "; expected ", dtype_name(scalar_type(accumulator(type))));
  const int64_t sets = 1 + ((outputs & kEntropy) != 0) + ((outputs & kLse) != 0);
  check_value(gradients.dim() == 3 && gradients.size(0) == sets && gradients.is_contiguous(), "gradients has shape ",
              shape_text(gradients), "; expected [", sets, ", N, H], contiguous");
  const int64_t rows = gradients.size(1), width = gradients.size(2);
  const Tensor out = empty({rows, width}, scalar_type(type), gradients);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    RowBackwardArgs<S> a;
    a.rows = rows;
    a.width = width;
    a.out = out.mutable_data_ptr();
    a.out_dtype = type;
    std::array<OptTensor, 3> wide;  // held until the kernel has run
    int64_t set = 0;
    const auto put = [&](int k, const OptTensor& g, const char* name, bool present) {
      if (g && present) {
        check_value(g->dim() == 1 && g->size(0) == rows, name, " has shape ", shape_text(*g), "; expected [", rows, "]");
        wide[size_t(k)] = to_contiguous(cast(*g, scalar_type(acc)));
        a.upstream[k] = data<S>(*wide[size_t(k)]);
      }
      a.gradients[k] = data<S>(gradients) + set * rows * width;
      set += present;
    };
    put(0, upstream.logp, "g_logp", true);
    put(1, upstream.entropy, "g_entropy", outputs & kEntropy);
    put(2, upstream.lse, "g_lse", outputs & kLse);
    cpu_row_backward(a);
  };
  acc == DType::f64 ? run(0.0) : run(0.0f);
  return out;
}

}  // namespace prefkern
