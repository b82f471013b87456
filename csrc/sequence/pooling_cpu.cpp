// The CPU walk of pooling.h: a task is a sequence and some of its features, token by token. Tokens of one step mostly lie
// together: a run of them is added up in the cache, and runs in double, which go to their step where another begins.
#include "sequence/pooling_cpu.h"

#include "core/elementary.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kRun = 64;

template <class S> struct Task {
  int64_t b, first, n, begin, end;

  Task(const PoolArgs<S>& a, int64_t task) {
    const int64_t tiles = a.features > kPoolFeatures ? ceil_div(a.features, kPoolFeatures) : 1;
    b = task / tiles;
    first = task % tiles * kPoolFeatures;
    n = a.features - first < kPoolFeatures ? a.features - first : kPoolFeatures;
    begin = sequence_begin(a.layout, b);
    end = sequence_end(a.layout, b);
  }
  int64_t place(const PoolArgs<S>& a, int64_t step) const { return (b * a.steps + step - 1) * a.features + first; }
};

// out[f] = make(vector or number at f) for n features.
template <class V, class Out, class Make> PK_HD void each_feature(int64_t n, Out* out, Make&& make) {
  using S = typename Lanes<V>::Scalar;
  int64_t f = 0;
  for (; f + Lanes<V>::count <= n; f += Lanes<V>::count) Mem<V>::store(out + f, make(V{}, f));
  for (; f < n; f++) Mem<S>::store(out + f, make(S{}, f));
}

template <class V, class T> void forward(const PoolArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  S run[kPoolFeatures];
  double total[kPoolFeatures];
  for (int64_t k = begin; k < end; k++) {
    const Task<S> task(a, k);
    const T* x =
        task.begin < task.end ? static_cast<const T*>(a.values) + row_offset(a.rows, task.begin) + task.first : nullptr;
    for (int64_t s = 1; s <= a.steps; s++) __builtin_memset(a.means + task.place(a, s), 0, task.n * sizeof(S));
    int64_t step = 0, length = 0;
    const auto end_run = [&] {
      if (length > 0)
        for (int64_t f = 0; f < task.n; f++) total[f] += double(run[f]);
      length = 0;
    };
    const auto change_step = [&](int64_t next) {
      end_run();
      if (step > 0) {
        S* sum = a.means + task.place(a, step);
        for (int64_t f = 0; f < task.n; f++) sum[f] = S(double(sum[f]) + total[f]);
      }
      __builtin_memset(total, 0, task.n * sizeof(double));
      step = next;
    };
    for (int64_t i = task.begin; i < task.end; i++, x += a.rows.inner_stride) {
      const int64_t s = token_step(a, i);
      if (s == 0) continue;
      if (s != step) change_step(s);
      if (length == kRun) end_run();
      if (length++ == 0) each_feature<V>(task.n, run, [&](auto lane, int64_t f) { return Mem<decltype(lane)>::load(x + f); });
      else
        each_feature<V>(task.n, run, [&](auto lane, int64_t f) {
          using L = decltype(lane);
          return Mem<L>::load(run + f) + Mem<L>::load(x + f);
        });
    }
    change_step(0);
    for (int64_t s = 1; s <= a.steps; s++) {
      const int64_t count = a.counts[task.b * a.steps + s - 1];
      S* mean = a.means + task.place(a, s);
      if (count > 0)
        each_feature<V>(task.n, mean,
                        [&](auto lane, int64_t f) { return pooled_mean(Mem<decltype(lane)>::load(mean + f), S(count)); });
    }
  }
}

template <class V, class T> void backward(const PoolArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  S share[kPoolFeatures];
  for (int64_t k = begin; k < end; k++) {
    const Task<S> task(a, k);
    T* grad = static_cast<T*>(a.grad) + task.begin * a.features + task.first;
    int64_t step = 0;  // whose share is at hand
    for (int64_t i = task.begin; i < task.end; i++, grad += a.features) {
      const int64_t s = token_step(a, i);
      if (s == 0) {
        __builtin_memset(grad, 0, task.n * sizeof(T));
        continue;
      }
      if (s != step) {
        const S* upstream = a.upstream + task.place(a, s);
        const S count = S(a.counts[task.b * a.steps + s - 1]);
        each_feature<V>(task.n, share,
                        [&](auto lane, int64_t f) { return pooled_mean(Mem<decltype(lane)>::load(upstream + f), count); });
        step = s;
      }
      each_feature<V>(task.n, grad, [&](auto lane, int64_t f) { return Mem<decltype(lane)>::load(share + f); });
    }
  }
}

template <class S> void count(const PoolArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++) {
    int64_t* counts = a.counts + b * a.steps;
    for (int64_t s = 0; s < a.steps; s++) counts[s] = 0;
    for (int64_t i = sequence_begin(a.layout, b); i < sequence_end(a.layout, b); i++)
      if (const int64_t s = token_step(a, i)) counts[s - 1]++;
  }
}

void forward_f32(const PoolArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return forward<VecF, bf16_t>(a, begin, end);
    case DType::f16: return forward<VecF, f16_t>(a, begin, end);
    default: return forward<VecF, float>(a, begin, end);
  }
}
void backward_f32(const PoolArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16: return backward<VecF, bf16_t>(a, begin, end);
    case DType::f16: return backward<VecF, f16_t>(a, begin, end);
    default: return backward<VecF, float>(a, begin, end);
  }
}

}  // namespace

extern const PoolingCpu pooling_cpu;
const PoolingCpu pooling_cpu = {&count<float>, &count<double>,           &forward_f32, &forward<double, double>,
                                &backward_f32, &backward<double, double>};

}  // namespace PK_ISA
}  // namespace prefkern
