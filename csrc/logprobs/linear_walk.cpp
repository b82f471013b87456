// The walk is the same on the CPU and on CUDA. Over blocks of the vocabulary (outer) and chunks of rows (inner): a GEMM writes a
// block of logits in the accumulator type, and fold_logits folds it while it is still in cache. The backward
// (linear_backward.cpp) recomputes each block, grad_logits turns it into d loss / d logits in place, and two GEMMs take it to the
// gradients. With the vocabulary outermost, a block of the weight's gradient is complete when its block ends, so its float32
// accumulator is as small as the block. What else a forward may leave for its backward is in linear_saved.h.
//
// Two forwards have walks of their own: the commonest one on the CPU (fused_forward.h), and one for Hopper (hopper_walk.h).
#include "logprobs/linear_walk.h"

#include <limits>

#include "logprobs/fused_forward.h"
#include "logprobs/hopper_walk.h"
#include "logprobs/linear_call.h"

namespace prefkern {
namespace {

// Writes the outputs, or where there are none leaves the rows' state; and on the way what is to be saved.
template <class S>
void forward_walk(const Head& h, int64_t outputs, const HeadOutputs* out, OptTensor state, KeptLogits* kept = nullptr,
                  RowGradients<S>* gradients = nullptr) {
  if (h.plan.fused && !kept && !gradients) return fused_forward(h, outputs, out, state);
  if (!kept && !gradients && takes_hopper(h, outputs)) return hopper_walk(h, outputs, out, state);
  FoldArgs<S> f;
  out ? set_outputs(f, *out, outputs, h.rows) : set_sums(f, outputs);
  const int64_t cols = h.plan.vocab_block;
  const bool direct = kept && kept->direct(h);
  const Tensor logits = empty({direct ? 0 : h.plan.row_chunk * cols}, scalar_type(h.logits), h.hidden);
  if (!state && cols < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  HeadFactors factors(h);
  for_blocks(h, [&](int64_t v, int64_t n_cols, int64_t r, int64_t n_rows) {
    void* z = direct ? kept->at(v, n_cols, r) : logits.mutable_data_ptr();
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
    if (kept && !direct) kept->write(v, n_cols, r, n_rows, logits);
    if (gradients) gradients->add(factors, a.block, v, r, static_cast<S*>(z), a.last ? a.row_max : a.state);
  });
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

HeadOutputs head_forward_saving(const HeadInputs& in, int64_t outputs, Save save, Tensor& saved) {
  const OnDevice guard(in.hidden);
  const Checked c = check(in);
  check_value(outputs & kSaveStats, "outputs lack the statistics that a backward needs");
  check_value(save == Save::logits || save == Save::row_gradients, "save is ", int64_t(save), "; accepted: 1 (logits), 2 (u)");
  const bool keeps = save == Save::logits;
  check_value(keeps || in.hidden.is_cpu(), "u is saved on the CPU only");
  check_value(keeps || !in.extras.lora_a, "u is saved for a head without lora only");
  if (keeps) {
    const DType rounded = DType(in.extras.logits_dtype), own = float_dtype(in.hidden, "hidden");
    saved = empty({c.rows * in.weight.size(0)}, scalar_type(rounded == DType::f32 ? own : rounded), in.hidden);
  } else {
    const int64_t sets = 1 + ((outputs & kEntropy) != 0) + ((outputs & kLse) != 0);
    saved = empty({sets, c.rows, in.hidden.size(1)}, scalar_type(c.acc), in.hidden);
  }
  if (c.nothing) {
    if (!keeps) torch::stable::zero_(saved);
    return make_outputs(outputs, c.rows, c.acc, in.hidden, true);
  }
  const Head h = head_of(in, c, in.hidden, keeps);
  const HeadOutputs out = make_outputs(outputs, h.rows, c.acc, in.hidden, false);
  const auto walk = [&](auto zero) {
    using S = decltype(zero);
    if (keeps) {
      KeptLogits kept(h, h.rows, saved);
      return forward_walk<S>(h, outputs, &out, {}, &kept);
    }
    RowGradients<S> gradients(h, outputs, saved);
    forward_walk<S>(h, outputs, &out, {}, nullptr, &gradients);
    OptTensor target_kept;
    if (h.keep) {
      Tensor ones = empty({h.rows}, scalar_type(h.acc), h.hidden);
      target_kept = of_kept_targets(torch::stable::fill_(ones, 1.0), h.keep, h.targets);
    }
    gradients.finish(out, target_kept);
    if (!c.active) return;
    const int64_t set = c.rows * h.width;
    for (int64_t k = 0; k < saved.size(0); k++)
      cpu_spread_rows(mutable_data<S>(saved) + k * set, h.width * int64_t(sizeof(S)), data<int64_t>(*c.active), h.rows, c.rows);
  };
  c.acc == DType::f64 ? walk(0.0) : walk(0.0f);
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

}  // namespace prefkern
