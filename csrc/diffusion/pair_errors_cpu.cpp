// The CPU walk of pair_errors.h. Winner and loser are read a block at a time, one behind the other, so that a target they share
// comes from memory once. Which of the elements of a block come together in a sum is the same for all three tensors.
#include "diffusion/pair_errors_cpu.h"

#include "diffusion/row_sums.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class V> struct SideTotals {
  Totals<V> square, change;
  double square_tail = 0, change_tail = 0;
};

template <bool REF, class V> PK_HD void add(V pred, V target, V ref, V& square, V& change) {
  const V d = pred - target;
  square += d * d;
  if (REF) change += error_change(pred, ref, target, d);
}

template <bool REF, class V, class T> PK_HD void add_block(SideTotals<V>& to, const T* p, const T* t, const T* r, int64_t n) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  V square[2] = {}, change[2] = {};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    V pred[2], target[2], ref[2] = {};
    Mem<V>::load_pair(p + i, pred[0], pred[1]);
    Mem<V>::load_pair(t + i, target[0], target[1]);
    if (REF) Mem<V>::load_pair(r + i, ref[0], ref[1]);
    for (int k = 0; k < 2; k++) add<REF>(pred[k], target[k], ref[k], square[k], change[k]);
  }
  for (int k = 0; k < 2; k++) {
    to.square.add(square[k]);
    if (REF) to.change.add(change[k]);
  }
  for (; i < n; i++) {
    S one = 0, other = 0;
    add<REF>(Mem<S>::load(p + i), Mem<S>::load(t + i), REF ? Mem<S>::load(r + i) : S(0), one, other);
    to.square_tail += double(one);
    to.change_tail += double(other);
  }
}

template <bool REF, class V, class T, class S> void sums_of(const DiffusionPairArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t slices = ceil_div(a.length, kCpuSlice);
  const bool both = a.pred_l.data != nullptr;
  for (int64_t at = begin; at < end; at++) {
    const int64_t b = at / slices, first = at % slices * kCpuSlice;
    const int64_t last = first + kCpuSlice < a.length ? first + kCpuSlice : a.length;
    const T *pred_w = latent_row<T>(a.pred_w, b), *target_w = latent_row<T>(a.target_w, b);
    const T *pred_l = both ? latent_row<T>(a.pred_l, b) : nullptr, *target_l = both ? latent_row<T>(a.target_l, b) : nullptr;
    const T *ref_w = REF ? latent_row<T>(a.ref_w, b) : pred_w, *ref_l = REF ? latent_row<T>(a.ref_l, b) : pred_l;
    SideTotals<V> w, l;
    for (int64_t i = first; i < last; i += kSumBlock) {
      const int64_t n = last - i < kSumBlock ? last - i : kSumBlock;
      add_block<REF>(w, pred_w + i, target_w + i, ref_w + i, n);
      if (both) add_block<REF>(l, pred_l + i, target_l + i, ref_l + i, n);
    }
    double* to = a.sums + at * kDiffusionSums;
    to[kSquareW] = w.square.sum() + w.square_tail;
    to[kChangeW] = w.change.sum() + w.change_tail;
    to[kSquareL] = l.square.sum() + l.square_tail;
    to[kChangeL] = l.change.sum() + l.change_tail;
  }
}

template <class V, class T, class S> void sums(const DiffusionPairArgs<S>& a, int64_t begin, int64_t end) {
  if (a.ref_w.data) sums_of<true, V, T>(a, begin, end);
  else sums_of<false, V, T>(a, begin, end);
}

template <class V, class T, class S> PK_HD void scale_block(const T* p, const T* t, S factor, T* to, int64_t n) {
  constexpr int64_t L = Lanes<V>::count;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    V pred[2], target[2];
    Mem<V>::load_pair(p + i, pred[0], pred[1]);
    Mem<V>::load_pair(t + i, target[0], target[1]);
    Mem<V>::store_pair(to + i, (pred[0] - target[0]) * factor, (pred[1] - target[1]) * factor);
  }
  for (; i < n; i++) Mem<S>::store(to + i, (Mem<S>::load(p + i) - Mem<S>::load(t + i)) * factor);
}

template <class V, class T, class S> void gradient(const DiffusionGradArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t slices = ceil_div(a.length, kCpuSlice);
  for (int64_t at = begin; at < end; at++) {
    const int64_t b = at / slices, first = at % slices * kCpuSlice;
    const int64_t last = first + kCpuSlice < a.length ? first + kCpuSlice : a.length;
    const S factor = S(gradient_factor(a, b));
    for (int64_t i = first; i < last; i += kSumBlock) {
      const int64_t n = last - i < kSumBlock ? last - i : kSumBlock, to = b * a.length + i;
      if (a.grad_w)
        scale_block<V>(latent_row<T>(a.pred_w, b) + i, latent_row<T>(a.target_w, b) + i, factor, static_cast<T*>(a.grad_w) + to,
                       n);
      if (a.grad_l)
        scale_block<V>(latent_row<T>(a.pred_l, b) + i, latent_row<T>(a.target_l, b) + i, -factor,
                       static_cast<T*>(a.grad_l) + to, n);
    }
  }
}

void sums_f32(const DiffusionPairArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return sums<VecF, bf16_t>(a, begin, end);
    case DType::f16: return sums<VecF, f16_t>(a, begin, end);
    default: return sums<VecF, float>(a, begin, end);
  }
}
void gradient_f32(const DiffusionGradArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return gradient<VecF, bf16_t>(a, begin, end);
    case DType::f16: return gradient<VecF, f16_t>(a, begin, end);
    default: return gradient<VecF, float>(a, begin, end);
  }
}

}  // namespace

extern const PairErrorsCpu pair_errors_cpu;
const PairErrorsCpu pair_errors_cpu = {&sums_f32, &sums<double, double, double>, &gradient_f32,
                                       &gradient<double, double, double>};

}  // namespace PK_ISA
}  // namespace prefkern
