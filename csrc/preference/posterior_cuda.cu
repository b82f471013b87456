// The CUDA walk of posterior.h: a thread per pair, in double: there are few.
#include "core/cuda.cuh"
#include "math/preference.h"
#include "preference/posterior.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) posterior_kernel(const PosteriorArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.pairs) return;
  const int64_t who = a.annotator ? a.annotator[i] : 0;
  const bool known = who >= 0 && who < a.annotators;
  a.posterior[i] = known ? static_cast<float>(label_posterior(a.margin[i], a.reliability[who])) : __builtin_nanf("");
}

}  // namespace

int cuda_label_posterior(const PosteriorArgs<float>& a, void* stream) {
  if (a.pairs == 0) return 0;
  PK_LAUNCH(posterior_kernel, dim3(static_cast<unsigned>(ceil_div(a.pairs, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
