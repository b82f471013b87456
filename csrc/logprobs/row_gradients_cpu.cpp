// The CPU walk of row_gradients.h.
#include "logprobs/row_gradients_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// f(i, V{}) over vectors, then f(i, S{}) over what is left.
template <class V, class F> PK_HD void over_lanes(int64_t n, F&& f) {
  using S = typename Lanes<V>::Scalar;
  int64_t i = 0;
  for (; i + Lanes<V>::count <= n; i += Lanes<V>::count) f(i, V{});
  for (; i < n; i++) f(i, S{});
}

// Moves sums taken against one maximum to another one, as softmax_rescale does.
template <class V, class S> void move_sums(S* a, S* b, int64_t width, S shift) {
  const S r = exp2_flush(shift);
  over_lanes<V>(width, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    const L sum = Mem<L>::load(a + i);
    if (b) Mem<L>::store(b + i, (Mem<L>::load(b + i) + sum * shift) * r);
    Mem<L>::store(a + i, sum * r);
  });
}

template <class V> void weigh_row(const WeighArgs<typename Lanes<V>::Scalar>& args, int64_t row) {
  using S = typename Lanes<V>::Scalar;
  const LogitBlock<S>& blk = args.block;
  const LogitTransform<S>& t = blk.transform;
  const S* x = args.logits + row * blk.cols;
  S* weights = args.weights + row * blk.cols;
  S* scaled = args.scaled_weights ? args.scaled_weights + row * blk.cols : nullptr;
  const S k = logit_factor(t, row) * S(kLog2E), max = args.max[row], held = args.held[row];
  if (!args.first && held != max)
    move_sums<V>(args.a + row * args.width, args.b ? args.b + row * args.width : nullptr, args.width,
                 clamp_exponent((held - max) * k));
  args.held[row] = max;

  const int64_t target = blk.targets[row] - blk.first_col;
  if (target >= 0 && target < blk.cols)
    args.target_slope[row] = pre_logit_slope(t, pre_logit(t, x[target], t.bias ? t.bias[target] : S(0)));
  if (max == kMinusInf<S>) {  // no logit so far has any weight
    over_lanes<V>(blk.cols, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      Mem<L>::store(weights + i, L{});
      if (scaled) Mem<L>::store(scaled + i, L{});
    });
    return;
  }
  over_lanes<V>(blk.cols, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    const L pre = pre_logit(t, Mem<L>::load(x + i), t.bias ? Mem<L>::load(t.bias + i) : L{});
    const L e = clamp_exponent((pre - max) * k);
    const L w = exp2_flush(e) * pre_logit_slope(t, pre);
    if (scaled) Mem<L>::store(scaled + i, w * e);
    Mem<L>::store(weights + i, w);
  });
}

template <class V, class T> void finish_row(const RowGradientArgs<typename Lanes<V>::Scalar>& args, int64_t row) {
  using S = typename Lanes<V>::Scalar;
  const LogitBlock<S>& b = args.block;
  const T* w = static_cast<const T*>(args.weight) + b.targets[row] * args.weight_stride;
  const int64_t at = row * args.width;
  const S factor = logit_factor(b.transform, row), log2_sum = args.row_log2_sum[row];
  const S scale = factor * exp2_flush(-log2_sum);  // a * scale = factor E
  const S keep = args.target_kept ? args.target_kept[row] : S(1), of_target = factor * args.target_slope[row];
  const S of_b = -S(kLn2) * scale;
  const S of_a = args.entropy_grad ? of_b * (args.entropy[row] * S(kLog2E) - log2_sum) : S(0);
  over_lanes<V>(args.width, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    const L a = Mem<L>::load(args.logp + at + i), mean = a * scale;
    if (args.lse) Mem<L>::store(args.lse + at + i, mean);
    if (args.entropy_grad)
      Mem<L>::store(args.entropy_grad + at + i, Mem<L>::load(args.entropy_grad + at + i) * of_b + a * of_a);
    Mem<L>::store(args.logp + at + i, keep == 0 ? L{} : L(Mem<L>::load(w + i) * of_target - mean));
  });
}

template <class V, class O> void backward_row(const RowBackwardArgs<typename Lanes<V>::Scalar>& args, int64_t row) {
  using S = typename Lanes<V>::Scalar;
  const S* gradients[3];
  S upstream[3];
  int n = 0;
  for (int k = 0; k < 3; k++) {
    const S g = args.upstream[k] ? args.upstream[k][row] : S(0);
    if (g == 0) continue;
    upstream[n] = g;
    gradients[n++] = args.gradients[k] + row * args.width;
  }
  O* out = static_cast<O*>(args.out) + row * args.width;
  over_lanes<V>(args.width, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    L sum{};
    for (int k = 0; k < n; k++) sum += Mem<L>::load(gradients[k] + i) * upstream[k];
    Mem<L>::store(out + i, sum);
  });
}

template <class V> void weigh(const WeighArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) weigh_row<V>(a, row);
}
template <class V, class T> void finish(const RowGradientArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) finish_row<V, T>(a, row);
}
template <class V, class O> void backward(const RowBackwardArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) backward_row<V, O>(a, row);
}

void finish_f32(const RowGradientArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.weight_dtype) {
    case DType::f32: return finish<VecF, float>(a, begin, end);
    case DType::bf16: return finish<VecF, bf16_t>(a, begin, end);
    case DType::f16: return finish<VecF, f16_t>(a, begin, end);
    case DType::f64: return;  // never
  }
}
void backward_f32(const RowBackwardArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.out_dtype) {
    case DType::f32: return backward<VecF, float>(a, begin, end);
    case DType::bf16: return backward<VecF, bf16_t>(a, begin, end);
    case DType::f16: return backward<VecF, f16_t>(a, begin, end);
    case DType::f64: return;  // never
  }
}

}  // namespace

extern const RowGradientsCpu row_gradients_cpu;
const RowGradientsCpu row_gradients_cpu = {&weigh<VecF>,  &weigh<double>,           &finish_f32, &finish<double, double>,
                                           &backward_f32, &backward<double, double>};

}  // namespace PK_ISA
}  // namespace prefkern
