// Moments of a batch, and values normalised by them. Two passes in double over parts of a fixed size, which are merged in
// order: the same bits on any number of threads. Moments of several devices are merged the same way.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/advantages.h"

namespace prefkern {

constexpr int64_t kMomentsPart = 1 << 14;

template <class S> struct MomentsArgs {
  int64_t count = 0;
  const S* values = nullptr;
  const S* weights = nullptr;     // not negative; or
  const uint8_t* mask = nullptr;  // bool; neither: everything counts once. Where the weight is 0 the value is not looked at.
  double* parts = nullptr;        // CUDA: [ceil(count / kMomentsPart), 3], scratch
  double* moments = nullptr;      // [3]: n, mean, sum of squares about the mean
};

struct MergeArgs {
  int64_t count = 0;
  const double* parts = nullptr;  // [count, 3]
  double* moments = nullptr;      // [3]
};

template <class S> struct BatchNormalizeArgs {
  int64_t count = 0;
  const S* values = nullptr;
  const uint8_t* mask = nullptr;  // null: everything counts. Outside the result is 0.
  const double* moments = nullptr;
  MomentsMode mode = MomentsMode::seq;
  double eps = 0;
  S* out = nullptr;
};

inline namespace PK_ISA {
template <class S> PK_HD double moments_weight(const MomentsArgs<S>& a, int64_t i) {
  if (a.mask) return a.mask[i] ? 1.0 : 0.0;
  if (!a.weights) return 1.0;
  const double w = double(a.weights[i]);
  return w < 0 ? __builtin_nan("") : w;  // on CUDA a negative one is not looked for
}
PK_HD Moments read_moments(const double* p) { return {p[0], p[1], p[2]}; }
PK_HD void write_moments(double* p, const Moments& m) {
  p[0] = m.n;
  p[1] = m.mean;
  p[2] = m.squares;
}
}  // namespace PK_ISA

PK_API void cpu_batch_moments(const MomentsArgs<float>& args);
PK_API void cpu_batch_moments(const MomentsArgs<double>& args);
PK_API void cpu_merge_moments(const MergeArgs& args);
PK_API void cpu_batch_normalize(const BatchNormalizeArgs<float>& args);
PK_API void cpu_batch_normalize(const BatchNormalizeArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_batch_moments(const MomentsArgs<float>& args, void* stream);
PK_API int cuda_merge_moments(const MergeArgs& args, void* stream);
PK_API int cuda_batch_normalize(const BatchNormalizeArgs<float>& args, void* stream);

}  // namespace prefkern
