// linear_shard, merge_linear_shards, linear_shard_backward: linear_logprobs of a vocabulary of which this process holds a
// range. The walks over the range are those of linear_logprobs.cpp; they end in the state of every row instead of its outputs,
// and in the accumulator of the hidden gradient instead of the gradient, because both are still to be joined with those of the
// other ranges.
#include <algorithm>
#include <limits>

#include "logprobs/linear_head.h"
#include "logprobs/shard_merge.h"

namespace prefkern {
namespace {

struct Range {
  int64_t first_col, vocab;  // of all ranges together
};

// A range without columns is checked as one of a single column.
void check_range(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Range& range) {
  const bool none = weight.dim() == 2 && weight.size(0) == 0;
  check_head(hidden, none ? zeros({1, weight.size(1)}, weight.scalar_type(), weight) : weight, none ? OptTensor() : bias);
  check_value(!none || !bias || (bias->dim() == 1 && bias->size(0) == 0), "bias has shape ",
              bias ? shape_text(*bias) : std::string(), "; expected [0]");
  check_value(range.vocab > 0, "vocab is ", range.vocab, "; a vocabulary needs at least one token");
  check_value(range.first_col >= 0 && range.first_col <= range.vocab - weight.size(0), "weight has ", weight.size(0),
              " rows from token ", range.first_col, " on, but the vocabulary has ", range.vocab);
}

void check_chunk_bytes(int64_t chunk_bytes) {
  check_value(chunk_bytes >= 0, "chunk_bytes is ", chunk_bytes, "; it must be positive, or None for the default");
}

Head planned(Head h, int64_t chunk_bytes, bool backward) {
  h.plan = plan_chunks({h.rows, h.width, h.vocab, h.dtype, h.cuda, backward, chunk_bytes});
  return h;
}

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block)
    for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk)
      body(v, std::min(h.plan.vocab_block, h.vocab - v), r, std::min(h.plan.row_chunk, h.rows - r));
}

template <class S>
LogitBlock<S> block_in(const Range& range, const Head& h, int64_t v, int64_t cols, int64_t r, int64_t rows) {
  LogitBlock<S> b = block_of<S>(h, v, cols, r, rows);
  b.first_col += range.first_col;
  b.vocab = range.vocab;
  return b;
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

template <class S> void forward_walk(const Head& h, const Range& range, int64_t outputs, Tensor& state) {
  const int64_t cols = h.plan.vocab_block;
  Tensor logits = empty({h.plan.row_chunk, cols}, scalar_type(h.acc), h.hidden);
  Operand hidden(h.hidden, h, h.plan.row_chunk), weight(h.weight, h, cols);
  S* z = mutable_data<S>(logits);
  FoldArgs<S> f;
  f.entropy = outputs & kEntropy;
  f.extra = outputs & (kSumSqProbs | kMeanLogit | kIsTop1);
  f.logits = z;
  f.last = false;
  f.state_stride = h.rows;
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    gemm(h.hidden, hidden.type(), n_rows, n_cols, h.width, hidden.rows(r, n_rows), weight.rows(v, n_cols, true), z, h.acc,
         n_cols, false);
    f.block = block_in<S>(range, h, v, n_cols, r, n_rows);
    f.logits_map = {1, n_cols, 0};
    f.first = v == 0;
    f.state = mutable_data<S>(state) + r;
    run_fold(f, h.stream, h.cuda);
  });
}

char* row_of(Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.mutable_data_ptr()) + row * matrix.size(1) * element_size(float_dtype(matrix, "gradient"));
}

struct RangeGrads {
  Tensor hidden, weight, bias;  // hidden and bias in the accumulator type
};

template <class S> RangeGrads backward_walk(const Head& h, const Range& range, const GradArgs<S>& upstream, int64_t needs) {
  const ScalarType acc = scalar_type(h.acc);
  const int64_t cols = h.plan.vocab_block;
  // As in linear_logprobs.cpp: the weight's gradient is written in place where one GEMM gives it or it has the accumulator type.
  const bool weight_direct = h.dtype == h.acc || (h.cuda && h.plan.row_chunk >= h.rows);
  const DType weight_type = weight_direct ? h.dtype : h.acc;
  const auto none = [&] { return empty({0}, acc, h.hidden); };
  Tensor logits = empty({h.plan.row_chunk, cols}, acc, h.hidden);
  Tensor d_hidden = needs & kGradHidden ? empty({h.rows, h.width}, acc, h.hidden) : none();
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
    g.block = block_in<S>(range, h, v, n_cols, r, n_rows);
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
      gemm(h.hidden, grad_type, n_rows, h.width, n_cols, dz, w, row_of(d_hidden, r), h.acc, h.width, v > 0);
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
  return {d_hidden, d_weight, d_bias};
}

template <class S> void run_merge(const ShardMergeArgs<S>& m, const Tensor& states) {
  if constexpr (sizeof(S) == 4) {
    if (states.is_cuda()) return check_cuda(cuda_merge_shards(m, current_stream(states)));
  }
  cpu_merge_shards(m);
}

}  // namespace

Tensor linear_shard(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                    OptTensor row_temperature, double temperature, double softcap, double logit_scale, int64_t ignore_index,
                    int64_t outputs, int64_t chunk_bytes, int64_t first_col, int64_t vocab) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const Range range{first_col, vocab};
  check_range(hidden, weight, bias, range);
  check_chunk_bytes(chunk_bytes);
  check_head_options(options);
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, vocab, ignore_index);
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  if (ignored == rows || weight.size(0) == 0) return empty_state(rows, acc, hidden);

  const bool compact = ignored > 0;
  const Tensor active = compact ? active_rows(t, ignored, ignore_index) : t;
  const Head h = planned(
      compact ? make_head(index_rows(hidden, active), weight, index_rows(t, active), bias, index_optional(tau, active), options)
              : make_head(hidden, weight, t, bias, tau, options),
      chunk_bytes, false);
  Tensor state = empty({kRowStateArrays, h.rows}, scalar_type(acc), hidden);
  acc == DType::f64 ? forward_walk<double>(h, range, outputs, state) : forward_walk<float>(h, range, outputs, state);
  if (!compact) return state;
  Tensor all = empty_state(rows, acc, hidden);
  for (int64_t k = 0; k < kRowStateArrays; k++) {
    Tensor into = torch::stable::select(all, 0, k);
    scatter_rows(into, active, torch::stable::select(state, 0, k));
  }
  return all;
}

HeadOutputs merge_linear_shards(const Tensor& states, const Tensor& targets, OptTensor row_temperature, double temperature,
                                double softcap, double logit_scale, int64_t ignore_index, int64_t outputs, int64_t vocab) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  check_head_options(options);
  const DType acc = float_dtype(states, "states");
  check_type(acc == DType::f32 || acc == DType::f64, "states has dtype ", dtype_name(states.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  check_value(states.dim() == 3 && states.size(0) > 0 && states.size(1) == kRowStateArrays, "states has shape ",
              shape_text(states), "; expected [R, ", kRowStateArrays, ", N] of at least one range");
  check_value(vocab > 0, "vocab is ", vocab, "; a vocabulary needs at least one token");
  const OnDevice guard(states);
  const int64_t rows = states.size(2);
  const Tensor t = checked_targets(targets, states, "states", rows, vocab, ignore_index).first;
  const OptTensor tau = checked_row_temperature(row_temperature, states, "states", rows, acc);
  // The states may lie apart, with other things between them; each is in one piece.
  const bool whole = states.stride(1) == rows && (rows == 1 || states.stride(2) == 1);
  const Tensor all = whole ? states : torch::stable::contiguous(states);
  const HeadOutputs out = make_outputs(outputs, rows, acc, states, false);
  if (rows == 0) return out;
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    ShardMergeArgs<S> m;
    m.rows.block = logit_block<S>(acc, rows, vocab, vocab, t, options, tau);
    m.rows.state = const_cast<S*>(data<S>(all));  // which is only read
    m.rows.state_stride = rows;
    m.shards = all.size(0);
    m.shard_stride = all.stride(0);
    set_outputs(m.rows, out, outputs, rows);
    run_merge(m, states);
  };
  acc == DType::f64 ? run(0.0) : run(0.0f);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_shard_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                         const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                         OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                         const Tensor& stats, double temperature, double softcap,
                                                         double logit_scale, int64_t ignore_index, int64_t needs,
                                                         int64_t chunk_bytes, int64_t first_col, int64_t vocab) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const Range range{first_col, vocab};
  check_range(hidden, weight, bias, range);
  check_chunk_bytes(chunk_bytes);
  check_head_options(options);
  check_value(!(needs & kGradBias) || bias, "needs asks for the gradient of the bias, but there is none");
  const OnDevice guard(hidden);
  const int64_t rows = hidden.size(0), columns = weight.size(0), width = hidden.size(1);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  auto [t, ignored] = checked_targets(targets, hidden, "hidden", rows, vocab, ignore_index);
  OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  Upstream up = checked_upstream(g_logp, g_entropy, g_lse, rows, acc, entropy, stats);
  if (ignored == rows || columns == 0) {
    const auto none = [&] { return empty({0}, scalar_type(acc), hidden); };
    return {needs & kGradHidden ? zeros({rows, width}, scalar_type(acc), hidden) : none(),
            needs & kGradWeight ? zeros({columns, width}, hidden.scalar_type(), hidden) : none(),
            needs & kGradBias ? zeros({columns}, bias->scalar_type(), hidden) : none()};
  }

  const auto run = [&](const Head& h, const Upstream& u, const Tensor& ent, const Tensor& st) {
    const auto walk = [&](auto zero) {
      GradArgs<decltype(zero)> g;
      set_upstream(g, u, ent, st, h.rows);
      return backward_walk<decltype(zero)>(h, range, g, needs);
    };
    return acc == DType::f64 ? walk(0.0) : walk(0.0f);
  };
  RangeGrads grads;
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
      Tensor full = zeros({rows, width}, scalar_type(acc), hidden);
      scatter_rows(full, active, grads.hidden);
      grads.hidden = full;
    }
  }
  if (needs & kGradBias) grads.bias = cast(grads.bias, bias->scalar_type());
  return {grads.hidden, grads.weight, grads.bias};
}

}  // namespace prefkern
