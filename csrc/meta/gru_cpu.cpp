// The elementwise half of a step of gru.h on the CPU, vectors along the hidden units.
#include "meta/gru_cpu.h"

#include "meta/partial_vectors.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class S> PK_HD bool terminal(const GruArgs<S>& a, int64_t row, int64_t step) {
  return a.done && a.done[row * a.steps + step] != 0;
}

template <class V>
void forward(const GruArgs<typename Lanes<V>::Scalar>& a, int64_t step, int64_t first, int64_t last,
             const typename Lanes<V>::Scalar* product, typename Lanes<V>::Scalar* carry) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const int64_t h = a.hidden;
  for (int64_t row = first; row < last; row++, product += 3 * h, carry += h) {
    const int64_t token = row * a.steps + step;
    const S* gates = a.gates + token * 3 * h;
    S *out = a.out + token * h, *saved = a.saved ? a.saved + token * 4 * h : nullptr;
    const bool reset = step > 0 && terminal(a, row, step - 1);
    for (int64_t j = 0; j < h; j += L) {
      const int64_t left = h - j;
      const auto get = [&](const S* p) { return load_some<V>(p + j, left, S(0)); };
      const auto c = gru_cell(get(gates), get(gates + h), get(gates + 2 * h), get(product), get(product + h),
                              get(product + 2 * h), get(a.bias), get(carry));
      store_some<V>(out + j, left, c.hidden);
      store_some<V>(carry + j, left, reset ? V{} : c.hidden);
      if (!saved) continue;
      store_some<V>(saved + j, left, c.reset);
      store_some<V>(saved + h + j, left, c.keep);
      store_some<V>(saved + 2 * h + j, left, c.fresh);
      store_some<V>(saved + 3 * h + j, left, c.inner);
    }
  }
}

template <class V>
void backward(const GruArgs<typename Lanes<V>::Scalar>& a, int64_t step, int64_t first, int64_t last,
              const typename Lanes<V>::Scalar* product, typename Lanes<V>::Scalar* carry) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const int64_t h = a.hidden;
  for (int64_t row = first; row < last; row++, product += h, carry += h) {
    const int64_t token = row * a.steps + step;
    const S *saved = a.saved + token * 4 * h, *grad_out = a.grad_out + token * h, *behind = a.out + (token + 1) * h;
    S *gates = a.grad_gates + token * 3 * h, *inner = a.grad_inner + token * h, *before = a.before + token * h;
    const bool fresh_start = step + 1 == a.steps || terminal(a, row, step);
    const bool linked = step > 0 && !terminal(a, row, step - 1);  // whether step - 1 took this step's state
    for (int64_t j = 0; j < h; j += L) {
      const int64_t left = h - j;
      const auto get = [&](const S* p) { return load_some<V>(p + j, left, S(0)); };
      const V hidden = fresh_start ? V{} : get(behind);
      const V grad = linked ? get(grad_out) + (get(carry) + get(product)) : get(grad_out);
      const auto d = gru_cell_backward(grad, get(saved), get(saved + h), get(saved + 2 * h), get(saved + 3 * h), hidden);
      store_some<V>(gates + j, left, d.g_r);
      store_some<V>(gates + h + j, left, d.g_z);
      store_some<V>(gates + 2 * h + j, left, d.g_n);
      store_some<V>(inner + j, left, d.inner);
      store_some<V>(before + j, left, hidden);
      store_some<V>(carry + j, left, d.hidden);
    }
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, double* c, bool accumulate) {
  for (int64_t i = 0; i < m; i++) {
    double* to = c + i * n;
    if (!accumulate)
      for (int64_t j = 0; j < n; j++) to[j] = 0;
    for (int64_t l = 0; l < k; l++) {
      const double factor = a[i * a_stride + l];
      const double* row = b + l * n;
      for (int64_t j = 0; j < n; j++) to[j] += factor * row[j];
    }
  }
}

}  // namespace

extern const GruCpu gru_cpu;
const GruCpu gru_cpu = {&forward<VecF>, &forward<double>, &backward<VecF>, &backward<double>, &multiply};

}  // namespace PK_ISA
}  // namespace prefkern
