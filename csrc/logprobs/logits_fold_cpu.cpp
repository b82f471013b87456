// The CPU walk of logits_fold.h. A row is taken in tiles that stay in the L1 cache: one sweep finds the tile's maximum,
// a second one adds its exponentials, so that memory is read once and an exponential is taken once per logit. Four
// accumulators of vector width hide the latency of the additions.
#include "logprobs/logits_fold_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kTile = 1024;  // 4 KiB of float
constexpr int kUnroll = 4;

// The running state of one row: sums against `max`, still spread over vector lanes.
template <class V> struct RowAccumulator {
  using S = typename Lanes<V>::Scalar;
  S max = kMinusInf<S>;
  SoftmaxSums<V> lanes[kUnroll];
  SoftmaxSums<S> tail;
};

template <class V, class T> PK_HD typename Lanes<V>::Scalar tile_max(const T* p, int64_t n) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  V m[kUnroll];
  for (int k = 0; k < kUnroll; k++) m[k] = splat<V>(kMinusInf<S>);
  int64_t i = 0;
  for (; i + kUnroll * L <= n; i += kUnroll * L) {
    for (int k = 0; k < kUnroll; k++) m[k] = vmax(Mem<V>::load(p + i + k * L), m[k]);
  }
  for (; i + L <= n; i += L) m[0] = vmax(Mem<V>::load(p + i), m[0]);
  S r = reduce_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  for (; i < n; i++) r = vmax(Mem<S>::load(p + i), r);
  return r;
}

template <bool ENTROPY, bool EXTRA, class V, class T>
PK_HD void fold_tile(const T* p, int64_t n, typename Lanes<V>::Scalar k, RowAccumulator<V>& a) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const S m = tile_max<V>(p, n);
  if (m > a.max) {
    for (auto& lane : a.lanes) softmax_rescale(lane, a.max, m, k);
    softmax_rescale(a.tail, a.max, m, k);
    a.max = m;
  }
  if (a.max == kMinusInf<S>) {  // nothing but -inf (or NaN) so far: there is no maximum to measure against
    for (int64_t i = 0; i < n; i++) {
      const S x = Mem<S>::load(p + i);
      if (x != x) a.tail.s = x;
      if (EXTRA) a.tail.x += x;
    }
    return;
  }
  int64_t i = 0;
  for (; i + kUnroll * L <= n; i += kUnroll * L) {
    // The next tile comes from memory while this one keeps the arithmetic units busy.
    for (int line = 0; line < kUnroll * L * int(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p + i + kTile) + line);
    for (int j = 0; j < kUnroll; j++) softmax_add<ENTROPY, EXTRA>(a.lanes[j], Mem<V>::load(p + i + j * L), a.max, k);
  }
  for (; i + L <= n; i += L) softmax_add<ENTROPY, EXTRA>(a.lanes[0], Mem<V>::load(p + i), a.max, k);
  for (; i < n; i++) softmax_add<ENTROPY, EXTRA>(a.tail, Mem<S>::load(p + i), a.max, k);
}

// Bias and softcap are applied into a buffer of one tile.
template <class V, class T, class S>
PK_HD const S* transformed_tile(const LogitTransform<S>& t, const T* p, int64_t first, int64_t n, S* out) {
  constexpr int64_t L = Lanes<V>::count;
  const S* bias = t.bias ? t.bias + first : nullptr;
  int64_t i = 0;
  for (; i + L <= n; i += L) Mem<V>::store(out + i, pre_logit(t, Mem<V>::load(p + i), bias ? Mem<V>::load(bias + i) : V{}));
  for (; i < n; i++) out[i] = pre_logit(t, S(Mem<S>::load(p + i)), bias ? bias[i] : S(0));
  return out;
}

template <bool ENTROPY, bool EXTRA, class V, class T>
void fold_row(const FoldArgs<typename Lanes<V>::Scalar>& args, int64_t row) {
  using S = typename Lanes<V>::Scalar;
  const LogitBlock<S>& b = args.block;
  const bool ignored = b.targets[row] == b.ignore_index;
  if (ignored) {
    if (args.last) write_outputs(args, row, SoftmaxOutputs<S>{}, S(0));
    return;
  }
  const T* x = static_cast<const T*>(args.logits) + row_offset(args.logits_map, row);
  const S factor = logit_factor(b.transform, row), k = factor * S(kLog2E);
  const int64_t target = b.targets[row] - b.first_col;  // column of the target, if inside [0, cols)

  SoftmaxRow<S> state{kMinusInf<S>, 0, 0, 0, 0, S(__builtin_nanf("")), kMinusInf<S>};
  if (!args.first) state = load_state(args, row);
  RowAccumulator<V> acc;
  acc.max = state.max;

  const bool plain = sizeof(T) == sizeof(S) && is_plain(b.transform);
  alignas(64) S buffer[kTile];
  for (int64_t first = 0; first < b.cols; first += kTile) {
    const int64_t n = first + kTile < b.cols ? kTile : b.cols - first;
    const S* tile = plain ? nullptr : transformed_tile<V>(b.transform, x + first, first, n, buffer);
    if (target >= first && target < first + n) {
      const int64_t here = target - first;
      state.target_pre = plain ? S(Mem<S>::load(x + target)) : tile[here];
      if (EXTRA) {
        const S left = plain ? tile_max<V>(x + first, here) : tile_max<V>(tile, here);
        state.best_before = vmax(left, acc.max);
      }
    }
    if (plain) fold_tile<ENTROPY, EXTRA, V>(x + first, n, k, acc);
    else fold_tile<ENTROPY, EXTRA, V>(tile, n, k, acc);
  }

  SoftmaxSums<S> sums = acc.tail;
  SoftmaxSums<V> all;
  for (const auto& lane : acc.lanes) {
    all.s += lane.s;
    all.u += lane.u;
    all.q += lane.q;
    all.x += lane.x;
  }
  sums.s += reduce_add(all.s);
  sums.u += reduce_add(all.u);
  sums.q += reduce_add(all.q);
  sums.x += reduce_add(all.x);
  SoftmaxSums<S> before{state.s, state.u, state.q, state.x};
  softmax_merge(state.max, before, acc.max, sums, k);
  state.s = before.s;
  state.u = before.u;
  state.q = before.q;
  state.x = before.x;

  if (!args.last) return store_state(args, row, state);
  write_outputs(args, row, softmax_finish(state, factor, b.vocab), state.max);
}

template <class V, class T> void fold_rows(const FoldArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  auto body = a.extra ? &fold_row<true, true, V, T> : a.entropy ? &fold_row<true, false, V, T> : &fold_row<false, false, V, T>;
  for (int64_t row = begin; row < end; row++) body(a, row);
}

// ---- gradient -------------------------------------------------------------------------------------------------------

template <class V, class T, class O> void grad_row(const GradArgs<typename Lanes<V>::Scalar>& args, int64_t row) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const LogitBlock<S>& b = args.block;
  const T* x = static_cast<const T*>(args.logits) + row_offset(args.logits_map, row);
  O* out = static_cast<O*>(args.grad) + row_offset(args.grad_map, row);
  if (b.targets[row] == b.ignore_index) {
    for (int64_t i = 0; i < b.cols; i++) Mem<S>::store(out + i, S(0));
    return;
  }
  const S entropy = args.g_entropy ? args.entropy[row] : S(0);
  const SoftmaxGrad<S> g = softmax_grad(args.row_max[row], args.row_log2_sum[row], logit_factor(b.transform, row), entropy,
                                        args.g_logp ? args.g_logp[row] : S(0), args.g_entropy ? args.g_entropy[row] : S(0),
                                        args.g_lse ? args.g_lse[row] : S(0));
  const int64_t target = b.targets[row] - b.first_col;
  const bool has_target = target >= 0 && target < b.cols;
  const LogitTransform<S>& t = b.transform;
  S target_pre = 0;
  if (is_plain(t)) {
    if (has_target) target_pre = Mem<S>::load(x + target);
    int64_t i = 0;
    for (; i + 2 * L <= b.cols; i += 2 * L) {
      for (int line = 0; line < 2 * L * int(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 2048 + line, 1);
      const V p0 = Mem<V>::load(x + i), p1 = Mem<V>::load(x + i + L);
      const V d0 = softmax_grad_value(g, p0), d1 = softmax_grad_value(g, p1);
      Mem<V>::store(out + i, d0);
      Mem<V>::store(out + i + L, d1);
    }
    for (; i + L <= b.cols; i += L) Mem<V>::store(out + i, softmax_grad_value(g, Mem<V>::load(x + i)));
    for (; i < b.cols; i++) Mem<S>::store(out + i, softmax_grad_value(g, S(Mem<S>::load(x + i))));
    if (has_target) Mem<S>::store(out + target, softmax_grad_value(g, target_pre) + g.target);
    return;
  }
  alignas(64) S buffer[kTile];
  for (int64_t first = 0; first < b.cols; first += kTile) {
    const int64_t n = first + kTile < b.cols ? kTile : b.cols - first;
    const S* pre = transformed_tile<V>(t, x + first, first, n, buffer);
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      const V v = Mem<V>::load(pre + i);
      Mem<V>::store(out + first + i, softmax_grad_value(g, v) * pre_logit_slope(t, v));
    }
    for (; i < n; i++) Mem<S>::store(out + first + i, softmax_grad_value(g, pre[i]) * pre_logit_slope(t, pre[i]));
    if (target >= first && target < first + n) {
      target_pre = pre[target - first];
      Mem<S>::store(out + target, (softmax_grad_value(g, target_pre) + g.target) * pre_logit_slope(t, target_pre));
    }
  }
}

template <class V, class T, class O> void grad_rows(const GradArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) grad_row<V, T, O>(a, row);
}

void fold_f32(const FoldArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.block.dtype) {
    case DType::f32: return fold_rows<VecF, float>(a, begin, end);
    case DType::bf16: return fold_rows<VecF, bf16_t>(a, begin, end);
    case DType::f16: return fold_rows<VecF, f16_t>(a, begin, end);
    case DType::f64: return;  // never: float accumulators do not take double logits
  }
}
void fold_f64(const FoldArgs<double>& a, int64_t begin, int64_t end) { fold_rows<double, double>(a, begin, end); }

// The gradient has the type of the logits.
void grad_f32(const GradArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.block.dtype) {
    case DType::f32: return grad_rows<VecF, float, float>(a, begin, end);
    case DType::bf16: return grad_rows<VecF, bf16_t, bf16_t>(a, begin, end);
    case DType::f16: return grad_rows<VecF, f16_t, f16_t>(a, begin, end);
    case DType::f64: return;
  }
}
void grad_f64(const GradArgs<double>& a, int64_t begin, int64_t end) { grad_rows<double, double, double>(a, begin, end); }

}  // namespace

extern const LogitsFoldCpu logits_fold_cpu;
const LogitsFoldCpu logits_fold_cpu = {&fold_f32, &fold_f64, &grad_f32, &grad_f64};

}  // namespace PK_ISA
}  // namespace prefkern
