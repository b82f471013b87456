// The products of greedy_select.h on the CPU: one candidate after the other, 32 sums in vectors.
#include "diversity/greedy_select_cpu.h"

#include "core/elementary_more.h"
#include "math/diversity.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class S> PK_HD S join(S* sums) {
  for (int half = kGreedySums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

template <class T> PK_HD double squares(const T* x, int64_t n) {
  double sums[kGreedySums] = {};
  int64_t k = 0;
  for (; k + kGreedySums <= n; k += kGreedySums)
    for (int i = 0; i < kGreedySums; i++) sums[i] += double(to_float(x[k + i])) * double(to_float(x[k + i]));
  for (int i = 0; k + i < n; i++) sums[i] += double(to_float(x[k + i])) * double(to_float(x[k + i]));
  return join(sums);
}

template <class T> PK_HD float dot(const T* x, const float* u, int64_t n) {
  constexpr int registers = kGreedySums / kLanes;
  VecF parts[registers] = {};
  int64_t k = 0;
  for (; k + kGreedySums <= n; k += kGreedySums)
    for (int r = 0; r < registers; r++) {
      const int64_t at = k + r * kLanes;
      parts[r] += rounded_product(Mem<VecF>::load(x + at), Mem<VecF>::load(u + at));
    }
  float sums[kGreedySums];
  for (int r = 0; r < registers; r++) Mem<VecF>::store(sums + r * kLanes, parts[r]);
  for (int i = 0; k + i < n; i++) sums[i] += rounded_product(to_float(x[k + i]), u[k + i]);
  return join(sums);
}
PK_HD double dot(const double* x, const double* u, int64_t n) {
  double sums[kGreedySums] = {};
  int64_t k = 0;
  for (; k + kGreedySums <= n; k += kGreedySums)
    for (int i = 0; i < kGreedySums; i++) sums[i] += x[k + i] * u[k + i];
  for (int i = 0; k + i < n; i++) sums[i] += x[k + i] * u[k + i];
  return join(sums);
}

template <class T, class S> PK_HD const T* vector(const GreedyArgs<S>& a, int64_t q, int64_t i) {
  return static_cast<const T*>(a.embeddings) + ((a.own_embeddings ? q * a.candidates : 0) + i) * a.width;
}
template <class S> PK_HD const S* inverse_norms(const GreedyArgs<S>& a, int64_t q) {
  return a.inverse_norms + (a.own_embeddings ? q * a.candidates : 0);
}

template <class T, class S> void norms(const GreedyArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++)
    a.inverse_norms[row] = S(inverse_norm(vsqrt(squares(static_cast<const T*>(a.embeddings) + row * a.width, a.width))));
}

template <class T, class S> void unit(const GreedyArgs<S>& a, int64_t q, int64_t candidate, S* u) {
  const T* x = vector<T>(a, q, candidate);
  const S inverse = inverse_norms(a, q)[candidate];
  for (int64_t k = 0; k < a.width; k++) u[k] = to_float(x[k]) * inverse;
}

template <class T, class S>
void update(const GreedyArgs<S>& a, int64_t q, const S* u, bool first, int64_t begin, int64_t end) {
  const S* inverses = inverse_norms(a, q);
  S* scores = a.scores + q * a.candidates;
  for (int64_t i = begin; i < end; i++) {
    if (!first && taken(scores[i])) continue;
    scores[i] = fold_cosine(dot(vector<T>(a, q, i), u, a.width) * inverses[i], scores[i], first, a.maximum);
  }
}

}  // namespace

#define PK_PARTS(T, S) {&norms<T, S>, &unit<T, S>, &update<T, S>}
extern const GreedySelectCpu greedy_select_cpu;
const GreedySelectCpu greedy_select_cpu = {PK_PARTS(float, float), PK_PARTS(bf16_t, float), PK_PARTS(f16_t, float),
                                           PK_PARTS(double, double)};
#undef PK_PARTS

}  // namespace PK_ISA
}  // namespace prefkern
