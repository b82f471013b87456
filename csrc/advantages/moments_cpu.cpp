// The CPU walk of moments.h: vectors of double, four sums side by side, always added in the same order.
#include "advantages/moments_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kSums = 4;

// `lanes` elements as double; 0 in the lanes beyond.
template <class T> PK_HD VecD load(const T* p, int64_t lanes) {
  typedef T Narrow __attribute__((vector_size(kWide * sizeof(T))));
  Narrow v = {};
  if (lanes == kWide) __builtin_memcpy(&v, p, sizeof v);
  else __builtin_memcpy(&v, p, lanes * sizeof(T));
  return __builtin_convertvector(v, VecD);
}

PK_HD double total(const VecD* sums) {
  const VecD v = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double t = 0;
  for (int j = 0; j < kWide; j++) t += v[j];
  return t;
}

// f(first element, lanes, which sum) over [begin, end).
template <class F> PK_HD void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kSums * kWide <= end; i += kSums * kWide)
    for (int j = 0; j < kSums; j++) f(i + j * kWide, int64_t(kWide), j);
  for (; i < end; i += kWide) f(i, end - i < kWide ? end - i : int64_t(kWide), 0);
}

// weight(first element, lanes). A value without weight may be NaN: it is replaced before it is multiplied.
template <class S, class Weight> Moments part(const S* values, int64_t begin, int64_t end, Weight&& weight) {
  const VecD zero = {};
  VecD n[kSums] = {}, sum[kSums] = {}, squares[kSums] = {};
  for_vectors(begin, end, [&](int64_t i, int64_t lanes, int j) {
    const VecD w = weight(i, lanes), v = load(values + i, lanes);
    n[j] += w;
    sum[j] += w * (w == 0.0 ? zero : v);
  });
  Moments m;
  m.n = total(n);
  if (m.n == 0) return m;
  m.mean = total(sum) / m.n;
  for_vectors(begin, end, [&](int64_t i, int64_t lanes, int j) {
    const VecD w = weight(i, lanes), d = load(values + i, lanes) - m.mean;
    squares[j] += w * (w == 0.0 ? zero : d * d);
  });
  m.squares = total(squares);
  return m;
}

template <class S> Moments part_of(const MomentsArgs<S>& a, int64_t begin, int64_t end) {
  if (a.mask) return part(a.values, begin, end, [&](int64_t i, int64_t lanes) { return load(a.mask + i, lanes); });
  if (a.weights) return part(a.values, begin, end, [&](int64_t i, int64_t lanes) { return load(a.weights + i, lanes); });
  const VecD one = VecD{} + 1.0;
  return part(a.values, begin, end, [&](int64_t, int64_t lanes) {
    VecD w = one;
    for (int64_t k = lanes; k < kWide; k++) w[k] = 0;
    return w;
  });
}

template <class S> void normalize(const BatchNormalizeArgs<S>& a, const Affine& f, int64_t begin, int64_t end) {
  if (!a.mask) {
    for (int64_t i = begin; i < end; i++) a.out[i] = S((double(a.values[i]) - f.center) * f.scale);
    return;
  }
  for (int64_t i = begin; i < end; i++) a.out[i] = a.mask[i] ? S((double(a.values[i]) - f.center) * f.scale) : S(0);
}

}  // namespace

extern const MomentsCpu moments_cpu;
const MomentsCpu moments_cpu = {&part_of<float>, &part_of<double>, &normalize<float>, &normalize<double>};

}  // namespace PK_ISA
}  // namespace prefkern
