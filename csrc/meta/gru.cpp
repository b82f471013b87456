// CPU entry points of gru.h: rows shared out over torch's threads, each task with a product of its own at every step.
//
// Elements of a product are added up in the same order however its rows are cut, so results do not depend on threads.
#include "meta/gru.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "core/gemm.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "meta/gru_cpu.h"

namespace prefkern {

PK_ISA_TABLE(GruCpu, gru_cpu)

namespace {

// Rows of a task: enough of them that packing U does not count beside its product, few enough that states stay in cache.
constexpr int64_t kLeastRows = 16, kMostRows = 256;
constexpr int64_t kColumnsPerTask = 16;

int64_t rows_per_task(int64_t rows) {
  return std::clamp<int64_t>(ceil_div(rows, std::max(1, num_threads())), kLeastRows, kMostRows);
}

// C [m, n] = A [m, k] B [k, n] (+ C) in one thread.
template <class S> class Products {
 public:
  Products(int64_t m, int64_t n, int64_t k) {
    if constexpr (std::is_same_v<S, float>) space_.reset(new float[gemm_of_isa().workspace(m, n, k) + kAlignment]);
  }
  void operator()(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_stride, const S* b, S* c, bool accumulate) {
    if constexpr (std::is_same_v<S, float>) {
      GemmArgs g{m, n, k, a, b, a_stride, n};
      g.c = c;
      g.c_stride = n;
      g.accumulate = accumulate;
      g.workspace = aligned(space_.get());
      gemm_of_isa().multiply(g);
    } else {
      gru_cpu().multiply_f64(m, n, k, a, a_stride, b, c, accumulate);
    }
  }

 private:
  std::unique_ptr<float[]> space_;
};

template <class S> auto forward_body() {
  if constexpr (std::is_same_v<S, float>) return gru_cpu().forward_f32;
  else return gru_cpu().forward_f64;
}
template <class S> auto backward_body() {
  if constexpr (std::is_same_v<S, float>) return gru_cpu().backward_f32;
  else return gru_cpu().backward_f64;
}

template <class S> void forward(const GruArgs<S>& a) {
  const int64_t h = a.hidden, rows = rows_per_task(a.rows);
  if (a.rows == 0 || a.steps == 0 || h == 0) return;
  parallel_for(0, ceil_div(a.rows, rows), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<S[]> product(new S[rows * 3 * h]), carry(new S[rows * h]);
    Products<S> multiply(rows, 3 * h, h);
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task * rows, last = std::min(a.rows, first + rows), count = last - first;
      std::fill_n(product.get(), count * 3 * h, S(0));
      std::fill_n(carry.get(), count * h, S(0));
      for (int64_t step = a.steps - 1; step >= 0; step--) {
        if (step + 1 < a.steps) multiply(count, 3 * h, h, carry.get(), h, a.weight_transposed, product.get(), false);
        forward_body<S>()(a, step, first, last, product.get(), carry.get());
      }
    }
  });
}

template <class S> void backward(const GruArgs<S>& a) {
  const int64_t h = a.hidden, rows = rows_per_task(a.rows);
  if (a.rows == 0 || a.steps == 0 || h == 0) return;
  parallel_for(0, ceil_div(a.rows, rows), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<S[]> product(new S[rows * h]), carry(new S[rows * h]);
    Products<S> multiply(rows, h, 2 * h);
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task * rows, last = std::min(a.rows, first + rows), count = last - first;
      for (int64_t step = 0; step < a.steps; step++) {
        backward_body<S>()(a, step, first, last, product.get(), carry.get());
        if (step + 1 == a.steps) continue;
        const int64_t token = first * a.steps + step;
        multiply(count, h, 2 * h, a.grad_gates + token * 3 * h, a.steps * 3 * h, a.weight, product.get(), false);
        multiply(count, h, h, a.grad_inner + token * h, a.steps * h, a.weight + 2 * h * h, product.get(), true);
      }
    }
  });
}

template <class S> void column_sums(const ColumnSumArgs<S>& a) {
  parallel_for(0, a.columns, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumnsPerTask) {
      const int64_t count = std::min(kColumnsPerTask, end - first);
      double sums[kColumnsPerTask] = {};
      for (int64_t row = 0; row < a.rows; row++)
        for (int64_t j = 0; j < count; j++) sums[j] += double(a.values[row * a.columns + first + j]);
      for (int64_t j = 0; j < count; j++) a.sums[first + j] = S(sums[j]);
    }
  });
}

}  // namespace

void cpu_gru_forward(const GruArgs<float>& args) { forward(args); }
void cpu_gru_forward(const GruArgs<double>& args) { forward(args); }
void cpu_gru_backward(const GruArgs<float>& args) { backward(args); }
void cpu_gru_backward(const GruArgs<double>& args) { backward(args); }
void cpu_column_sums(const ColumnSumArgs<float>& args) { column_sums(args); }
void cpu_column_sums(const ColumnSumArgs<double>& args) { column_sums(args); }

}  // namespace prefkern
