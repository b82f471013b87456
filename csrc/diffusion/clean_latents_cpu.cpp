// The CPU walk of clean_latents.h.
#include "diffusion/clean_latents_cpu.h"

#include "diffusion/row_sums.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

struct Slice {
  int64_t row, first, end;
};
PK_HD Slice slice_of(int64_t at, int64_t length) {
  const int64_t slices = ceil_div(length, kCpuSlice), first = at % slices * kCpuSlice;
  return {at / slices, first, first + kCpuSlice < length ? first + kCpuSlice : length};
}

// Two vectors of each of three rows.
template <class V> struct Three {
  V a[2], b[2], c[2];
};
template <class V, class T> PK_HD Three<V> load(const T* a, const T* b, const T* c) {
  Three<V> v;
  Mem<V>::load_pair(a, v.a[0], v.a[1]);
  Mem<V>::load_pair(b, v.b[0], v.b[1]);
  Mem<V>::load_pair(c, v.c[0], v.c[1]);
  return v;
}

template <class V, class T, class S> void sums(const X0LossArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t at = begin; at < end; at++) {
    const Slice s = slice_of(at, a.length);
    const T *pred = latent_row<T>(a.pred, s.row), *x = latent_row<T>(a.x, s.row), *target = latent_row<T>(a.target, s.row);
    const S c_x = S(a.coefficients[s.row]), c_e = S(a.coefficients[a.rows + s.row]), c = S(a.c);
    Totals<V> total;
    double tail = 0;
    for (int64_t first = s.first; first < s.end; first += kSumBlock) {
      const int64_t last = first + kSumBlock < s.end ? first + kSumBlock : s.end;
      V sum[2] = {};
      int64_t i = first;
      for (; i + 2 * L <= last; i += 2 * L) {
        const Three<V> v = load<V>(pred + i, x + i, target + i);
        for (int k = 0; k < 2; k++) sum[k] += x0_loss(a.kind, v.b[k] * c_x + v.a[k] * c_e - v.c[k], c);
      }
      for (int k = 0; k < 2; k++) total.add(sum[k]);
      for (; i < last; i++)
        tail += double(x0_loss(a.kind, Mem<S>::load(x + i) * c_x + Mem<S>::load(pred + i) * c_e - Mem<S>::load(target + i), c));
    }
    a.sums[at] = total.sum() + tail;
  }
}

template <class V, class T, class S> void gradient(const X0GradArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t at = begin; at < end; at++) {
    const Slice s = slice_of(at, a.length);
    const T *pred = latent_row<T>(a.pred, s.row), *x = latent_row<T>(a.x, s.row), *target = latent_row<T>(a.target, s.row);
    const S c_x = S(a.coefficients[s.row]), c_e = S(a.coefficients[a.rows + s.row]), c = S(a.c);
    const S factor = S(gradient_factor(a, s.row));
    T* to = static_cast<T*>(a.grad) + s.row * a.length;
    int64_t i = s.first;
    for (; i + 2 * L <= s.end; i += 2 * L) {
      const Three<V> v = load<V>(pred + i, x + i, target + i);
      V g[2];
      for (int k = 0; k < 2; k++) g[k] = x0_slope(a.kind, v.b[k] * c_x + v.a[k] * c_e - v.c[k], c) * factor;
      Mem<V>::store_pair(to + i, g[0], g[1]);
    }
    for (; i < s.end; i++) {
      const S y = Mem<S>::load(x + i) * c_x + Mem<S>::load(pred + i) * c_e - Mem<S>::load(target + i);
      Mem<S>::store(to + i, x0_slope(a.kind, y, c) * factor);
    }
  }
}

template <class V, class T, class S> void step_of(const LatentStepArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t at = begin; at < end; at++) {
    const Slice s = slice_of(at, a.length);
    const LatentRows rows[3] = {a.x, a.e1, a.e2};
    const T* from[3];
    S factor[3];
    int terms = 0;
    for (int k = 0; k < 3; k++) {
      const double c = step_coefficient(a, k, s.row);
      if (c == 0) continue;
      from[terms] = latent_row<T>(rows[k], s.row);
      factor[terms++] = S(c);
    }
    T* to = static_cast<T*>(a.out) + s.row * a.length;
    int64_t i = s.first;
    for (; i + 2 * L <= s.end; i += 2 * L) {
      V sum[2] = {};
      for (int k = 0; k < terms; k++) {
        V v[2];
        Mem<V>::load_pair(from[k] + i, v[0], v[1]);
        for (int j = 0; j < 2; j++) sum[j] += v[j] * factor[k];
      }
      Mem<V>::store_pair(to + i, sum[0], sum[1]);
    }
    for (; i < s.end; i++) {
      S sum = 0;
      for (int k = 0; k < terms; k++) sum += Mem<S>::load(from[k] + i) * factor[k];
      Mem<S>::store(to + i, sum);
    }
  }
}

void sums_f32(const X0LossArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return sums<VecF, bf16_t>(a, begin, end);
    case DType::f16: return sums<VecF, f16_t>(a, begin, end);
    default: return sums<VecF, float>(a, begin, end);
  }
}
void gradient_f32(const X0GradArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return gradient<VecF, bf16_t>(a, begin, end);
    case DType::f16: return gradient<VecF, f16_t>(a, begin, end);
    default: return gradient<VecF, float>(a, begin, end);
  }
}
void step(const LatentStepArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32: return step_of<VecF, float, float>(a, begin, end);
    case DType::bf16: return step_of<VecF, bf16_t, float>(a, begin, end);
    case DType::f16: return step_of<VecF, f16_t, float>(a, begin, end);
    case DType::f64: return step_of<double, double, double>(a, begin, end);
  }
}

}  // namespace

extern const CleanLatentsCpu clean_latents_cpu;
const CleanLatentsCpu clean_latents_cpu = {&sums_f32, &sums<double, double, double>, &gradient_f32,
                                           &gradient<double, double, double>, &step};

}  // namespace PK_ISA
}  // namespace prefkern
