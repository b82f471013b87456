// The gradients of a row's outputs with respect to its hidden state, formed in the forward where the head itself is frozen: as
// attention forms its outputs, with the weight for keys and values. With t as in math/softmax.h and c_v = d pre_v / d x_v,
//   a = sum_v 2^t c_v W_v,   b = sum_v 2^t t c_v W_v,   E = a / s
//   d logp / d h    = factor (c_y W_y - E)
//   d entropy / d h = -factor ln2 (b / s + (H / ln2 - log2 s) E)
//   d lse / d h     = factor E.
// weigh_logits turns a block of logits into the weights of a block of W, which a GEMM adds to the sums; these are moved when
// the running maximum is. finish_row_gradients makes gradients of the sums, row_backward multiplies them with what comes from above.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

// Contiguous matrices: logits and weights [rows, cols], sums [rows, width].
template <class S> struct WeighArgs {
  LogitBlock<S> block;
  const S* logits = nullptr;
  S* weights = nullptr;  // 2^t c; may be the logits' own memory
  S* scaled_weights = nullptr;  // 2^t t c, or null
  const S* max = nullptr;  // the largest pre of the row so far
  S* held = nullptr;  // the maximum that the row's sums are taken against; becomes max
  bool first = true;  // there are no sums yet
  S *a = nullptr, *b = nullptr;  // b is null where scaled_weights is
  int64_t width = 0;
  S* target_slope = nullptr;  // [rows]: c_y, once its block is met
};

template <class S> struct RowGradientArgs {
  LogitBlock<S> block;  // rows, targets, transform
  const void* weight = nullptr;  // [V, width]
  DType weight_dtype = DType::f32;
  int64_t weight_stride = 0, width = 0;
  const S *row_log2_sum = nullptr, *entropy = nullptr, *target_slope = nullptr;
  const S* target_kept = nullptr;  // 1, or 0 where no gradient flows to logp; null = 1
  S* logp = nullptr;  // [rows, width] each: a comes in, the gradient of logp goes out
  S* entropy_grad = nullptr;  // b comes in, the gradient of entropy goes out; or null
  S* lse = nullptr;  // out; or null
};

// out = sum over the outputs of upstream gradient * row gradient. Where an upstream gradient is 0 the row gradient is not looked at.
template <class S> struct RowBackwardArgs {
  int64_t rows = 0, width = 0;
  const S* upstream[3] = {};  // [rows] each; null = zero
  const S* gradients[3] = {};  // [rows, width]
  void* out = nullptr;
  DType out_dtype = DType::f32;  // f64 if and only if S is double
};

PK_API void cpu_weigh_logits(const WeighArgs<float>& args);
PK_API void cpu_weigh_logits(const WeighArgs<double>& args);
PK_API void cpu_finish_row_gradients(const RowGradientArgs<float>& args);
PK_API void cpu_finish_row_gradients(const RowGradientArgs<double>& args);
PK_API void cpu_row_backward(const RowBackwardArgs<float>& args);
PK_API void cpu_row_backward(const RowBackwardArgs<double>& args);

}  // namespace prefkern
