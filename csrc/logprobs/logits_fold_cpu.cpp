// The CPU walk of logits_fold.h. A row is read once, in tiles: a tile is added up against the largest logit so far, and its
// own maximum found on the way. Processors without AVX-512 take as long for the exponential of a vector as for reading it,
// or longer, so what counts is how many instructions a vector takes and that none of its operands leave the registers.
#include "logprobs/logits_fold_cpu.h"

#include "core/elementary_more.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kTile = 1024;  // 4 KiB of float

// Where products are not rounded before they are added to, an exponent (pre - max) k is one instruction, pre k - (max k): all
// exponents are then off by the rounding error of max k, and as long as that is small the sums can be shifted back.
template <class V> constexpr bool kFused = kMultiplyAdds && sizeof(V) > 8;
template <class S> constexpr S kFusedLimit = 0x1p20f;

// The running state of one row: sums against `max`, still spread over vector lanes.
template <class V> struct RowAccumulator {
  using S = typename Lanes<V>::Scalar;
  S max = kMinusInf<S>;
  S product = __builtin_inff(), error = 0, correction = 1;  // max k as it is rounded, what is missing from it, and 2^error
  SoftmaxSums<V> lanes;
  SoftmaxSums<S> tail;
  PK_HD bool fused() const { return kFused<V> && product < kFusedLimit<S> && product > -kFusedLimit<S>; }
};

template <class V, class T> PK_HD typename Lanes<V>::Scalar tile_max(const T* p, int64_t n) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  V m[2];
  for (V& each : m) each = splat<V>(kMinusInf<S>);
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    V a, b;
    Mem<V>::load_pair(p + i, a, b);
    m[0] = vmax(a, m[0]);
    m[1] = vmax(b, m[1]);
  }
  for (; i + L <= n; i += L) m[0] = vmax(Mem<V>::load(p + i), m[0]);
  S r = reduce_max(vmax(m[0], m[1]));
  for (; i < n; i++) r = vmax(Mem<S>::load(p + i), r);
  return r;
}

template <class V> PK_HD void join(SoftmaxSums<V>& a, const SoftmaxSums<V>& b) {
  a.s += b.s;
  a.u += b.u;
  a.q += b.q;
  a.x += b.x;
}

// A tile's sums against `max`, which must be finite, and the tile's own maximum.
template <class V> struct TileSums {
  using S = typename Lanes<V>::Scalar;
  SoftmaxSums<V> lanes;
  SoftmaxSums<S> tail;
  S max;
};
// Half-precision logits come twice as fast from memory; a degree less in their exponential still leaves logp and entropy with
// a third of the error that is promised.
template <bool FUSED, bool ENTROPY, bool EXTRA, class T, class V, class S>
PK_HD void add(SoftmaxSums<V>& sums, V pre, S max, S k, S product) {
  const V t = clamp_exponent(FUSED ? pre * k - product : (pre - max) * k);
  if constexpr (sizeof(T) == 2) softmax_add_power<ENTROPY, EXTRA>(sums, pre, t, exp2_coarse(t));
  else softmax_add_power<ENTROPY, EXTRA>(sums, pre, t, exp2_flush(t));
}

template <bool FUSED, bool ENTROPY, bool EXTRA, class V, class T>
PK_HD TileSums<V> tile_sums(const T* p, int64_t n, typename Lanes<V>::Scalar k, const RowAccumulator<V>& row) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const S max = row.max, product = row.product;
  TileSums<V> r;
  SoftmaxSums<V> sums;  // one set: with two the registers do not suffice
  V most = splat<V>(max);
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    // The next tile comes from memory while this one keeps the arithmetic units busy.
    __builtin_prefetch(p + i + kTile);
    if (2 * L * sizeof(T) > 64) __builtin_prefetch(p + i + kTile + L);
    V a, b;
    Mem<V>::load_pair(p + i, a, b);
    most = vmax(a, most);
    most = vmax(b, most);
    add<FUSED, ENTROPY, EXTRA, T>(sums, a, max, k, product);
    add<FUSED, ENTROPY, EXTRA, T>(sums, b, max, k, product);
  }
  for (; i + L <= n; i += L) {
    const V a = Mem<V>::load(p + i);
    most = vmax(a, most);
    add<FUSED, ENTROPY, EXTRA, T>(sums, a, max, k, product);
  }
  r.lanes = sums;
  r.max = reduce_max(most);
  if (FUSED) softmax_shift(r.lanes, row.error, row.correction);
  for (; i < n; i++) {
    const S x = Mem<S>::load(p + i);
    r.max = vmax(x, r.max);
    softmax_add<ENTROPY, EXTRA>(r.tail, x, max, k);
  }
  return r;
}
template <bool ENTROPY, bool EXTRA, class V, class T>
PK_HD TileSums<V> tile_sums(const T* p, int64_t n, typename Lanes<V>::Scalar k, const RowAccumulator<V>& row) {
  if constexpr (kFused<V> && sizeof(T) == 2)  // in float32 a shift of all logits is to change no bit of logp
    if (row.fused()) return tile_sums<true, ENTROPY, EXTRA, V>(p, n, k, row);
  return tile_sums<false, ENTROPY, EXTRA, V>(p, n, k, row);
}

template <class V> PK_HD void raise_max(RowAccumulator<V>& a, typename Lanes<V>::Scalar max, typename Lanes<V>::Scalar k) {
  softmax_rescale(a.lanes, a.max, max, k);
  softmax_rescale(a.tail, a.max, max, k);
  a.max = max;
  if constexpr (kFused<V>) {
    a.product = rounded_product(max, k);
    if (!a.fused()) return;
    a.error = __builtin_fmaf(-max, k, a.product);  // not an expression, which would take max k from above
    a.correction = exp2_flush(a.error);
  }
}

// The tile is added up against the maximum so far. Where it has a larger one its exponentials are above 1: up to
// kHeadroom powers of two that costs nothing, beyond that the tile is taken again.
template <bool ENTROPY, bool EXTRA, class V, class T>
PK_HD void fold_tile(const T* p, int64_t n, typename Lanes<V>::Scalar k, RowAccumulator<V>& a) {
  using S = typename Lanes<V>::Scalar;
  constexpr S kHeadroom = 32;
  if (a.max == kMinusInf<S>) {
    const S m = tile_max<V>(p, n);
    if (m == kMinusInf<S>) {  // nothing but -inf (or NaN) so far: there is no maximum to measure against
      for (int64_t i = 0; i < n; i++) {
        const S x = Mem<S>::load(p + i);
        if (x != x) a.tail.s = x;
        if (EXTRA) a.tail.x += x;
      }
      return;
    }
    raise_max(a, m, k);
  }
  TileSums<V> tile = tile_sums<ENTROPY, EXTRA, V>(p, n, k, a);
  const S max = tile.max;
  if ((max - a.max) * k > kHeadroom) {
    raise_max(a, max, k);
    tile = tile_sums<ENTROPY, EXTRA, V>(p, n, k, a);
  }
  join(a.lanes, tile.lanes);
  join(a.tail, tile.tail);
  if (max > a.max) raise_max(a, max, k);
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
  if (state.max != kMinusInf<S>) raise_max(acc, state.max, k);

  const bool plain = is_plain(b.transform);
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
  sums.s += reduce_add(acc.lanes.s);
  sums.u += reduce_add(acc.lanes.u);
  sums.q += reduce_add(acc.lanes.q);
  sums.x += reduce_add(acc.lanes.x);
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
      V p0, p1;
      Mem<V>::load_pair(x + i, p0, p1);
      Mem<V>::store_pair(out + i, softmax_grad_value(g, p0), softmax_grad_value(g, p1));
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
