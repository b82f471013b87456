// The CPU walk of moments.h. Eight sums side by side, so that the compiler can make vectors of them in any instruction set
// without changing a bit.
#include "advantages/moments_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kSums = 8;

PK_HD double total(const double* sums) {
  double t = 0;
  for (int j = 0; j < kSums; j++) t += sums[j];
  return t;
}

// f(sums, element, lane) over [begin, end).
template <class F> PK_HD void for_elements(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums)
    for (int j = 0; j < kSums; j++) f(i + j, j);
  for (int j = 0; i + j < end; j++) f(i + j, j);
}

template <class S, class Weight> Moments part(const S* values, int64_t begin, int64_t end, Weight&& weight) {
  double n[kSums] = {}, sum[kSums] = {}, squares[kSums] = {};
  for_elements(begin, end, [&](int64_t i, int j) {
    const double w = weight(i), v = w == 0 ? 0.0 : double(values[i]);
    n[j] += w;
    sum[j] += w * v;
  });
  Moments m;
  m.n = total(n);
  if (m.n == 0) return m;
  m.mean = total(sum) / m.n;
  for_elements(begin, end, [&](int64_t i, int j) {
    const double w = weight(i), d = (w == 0 ? m.mean : double(values[i])) - m.mean;
    squares[j] += w * d * d;
  });
  m.squares = total(squares);
  return m;
}

template <class S> Moments part_of(const MomentsArgs<S>& a, int64_t begin, int64_t end) {
  if (a.mask) return part(a.values, begin, end, [&](int64_t i) { return a.mask[i] ? 1.0 : 0.0; });
  if (a.weights) return part(a.values, begin, end, [&](int64_t i) { return double(a.weights[i]); });
  return part(a.values, begin, end, [](int64_t) { return 1.0; });
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
