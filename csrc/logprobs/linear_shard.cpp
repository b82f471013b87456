// linear_shard, merge_linear_shards, linear_shard_backward: linear_logprobs of a vocabulary of which this process holds a
// range. Its walks end in the state of every row instead of its outputs, and in the accumulator of the hidden gradient instead of
// the gradient, because both are still to be joined with those of the other ranges.
#include "logprobs/linear_walk.h"
#include "logprobs/shard_merge.h"

namespace prefkern {
namespace {

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
  return head_state({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, {}, VocabRange{first_col, vocab}},
                    outputs);
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
  check_value(!(needs & kGradBias) || bias, "needs asks for the gradient of the bias, but there is none");
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadGrads g =
      head_backward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, {}, VocabRange{first_col, vocab}},
                    {g_logp, g_entropy, g_lse}, entropy, stats, needs);
  return {g.hidden, g.weight, g.bias};
}

}  // namespace prefkern
