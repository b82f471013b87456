// The CUDA walk of skew.h: a thread takes a row, whose embeddings are short; a warp takes a list.
#include "core/cuda.cuh"
#include "lists/row_loss.cuh"
#include "lists/skew.h"

namespace prefkern {
namespace {

constexpr int kThreads = 128, kLists = kThreads / kWarp;

__device__ __forceinline__ float sum_sq(const float* v, int64_t width) {
  float sum = 0;
  for (int64_t d = 0; d < width; d++) sum += v[d] * v[d];
  return sum;
}

__device__ __forceinline__ void one_row(const SkewArgs<float>& a, int64_t b) {
  const int64_t width = a.width, blocks = width / 2;
  const float *x = a.left + b * width, *y = a.right + b * width, *scales = a.scales ? a.scales + b * blocks : nullptr;
  const float left_sq = sum_sq(x, width), right_sq = sum_sq(y, width), inverse_tau = float(1 / a.rule.tau);
  const float left = inverse_length<float, float>(a.rule.normalize, left_sq);
  const float right = inverse_length<float, float>(a.rule.normalize, right_sq);
  float score = 0;
  for (int64_t l = 0; l < blocks; l++) {
    const float block = skew_block(x[2 * l] * left, x[2 * l + 1] * left, y[2 * l] * right, y[2 * l + 1] * right);
    score += scales ? block * scales[l] : block;
  }
  const auto g = logistic((score - (a.margin ? a.margin[b] : 0.0f)) * inverse_tau);
  const float slope = a.rule.with_loss ? -(g.p * inverse_tau) : 1.0f;
  leave_row(a.out, b, a.rule.with_loss ? g.nll : score, 1, g.q, score > 0);
  // Along itself a vector changes the score by the score; a length at its floor is a constant.
  const float left_along = has_length<float, float>(a.rule.normalize, left_sq) ? slope * score : 0.0f;
  const float right_along = has_length<float, float>(a.rule.normalize, right_sq) ? slope * score : 0.0f;
  for (int64_t l = 0; l < blocks; l++) {
    const float a0 = x[2 * l] * left, a1 = x[2 * l + 1] * left, b0 = y[2 * l] * right, b1 = y[2 * l + 1] * right;
    const float factor = scales ? slope * scales[l] : slope;
    const int64_t at = b * width + 2 * l;
    if (a.left_grad) {
      a.left_grad[at] = (factor * b1 - left_along * a0) * left;
      a.left_grad[at + 1] = (-factor * b0 - left_along * a1) * left;
    }
    if (a.right_grad) {
      a.right_grad[at] = (-factor * a1 - right_along * b0) * right;
      a.right_grad[at + 1] = (factor * a0 - right_along * b1) * right;
    }
    if (a.scales_grad) a.scales_grad[b * blocks + l] = slope * skew_block(a0, a1, b0, b1);
  }
}

__global__ void __launch_bounds__(kThreads) rows_kernel(const SkewArgs<float> a) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < a.out.rows) one_row(a, b);
  finish_rows_on_device<kThreads>(a.out);
}

// The inverse lengths wait in `means` for the mean, which is formed one dimension after the other.
__global__ void __launch_bounds__(kThreads) means_kernel(const SkewMeansArgs<float> a) {
  const int64_t b = int64_t(blockIdx.x) * kLists + threadIdx.x / kWarp, width = a.width, blocks = width / 2;
  const int lane = threadIdx.x % kWarp;
  if (b >= a.lists) return;  // a whole warp at a time
  const float *v = a.embeddings + b * a.items * width, *scales = a.scales ? a.scales + b * blocks : nullptr;
  const uint8_t* mask = a.mask ? a.mask + b * a.items : nullptr;
  float *means = a.means + b * a.items, *mean = a.scratch + b * width, count = 0;
  for (int64_t i = lane; i < a.items; i += kWarp) {
    if (mask && !mask[i]) continue;
    count += 1;
    means[i] = inverse_length<float, float>(a.rule.normalize, sum_sq(v + i * width, width));
  }
  count = warp_reduce(count, Add());
  const float share = 1 / (count > 0 ? count : 1.0f);
  for (int64_t d = 0; d < width; d++) {
    float sum = 0;
    for (int64_t i = lane; i < a.items; i += kWarp)
      if (!mask || mask[i]) sum += v[i * width + d] * means[i];
    sum = warp_reduce(sum, Add());
    if (lane == 0) mean[d] = sum * share;
  }
  __syncwarp();
  const float inverse_tau = float(1 / a.rule.tau);
  for (int64_t i = lane; i < a.items; i += kWarp) {
    const float* x = v + i * width;
    float score = 0;
    if (!mask || mask[i]) {
      const float inverse = means[i];
      for (int64_t l = 0; l < blocks; l++) {
        const float block = skew_block(x[2 * l] * inverse, x[2 * l + 1] * inverse, mean[2 * l], mean[2 * l + 1]);
        score += scales ? block * scales[l] : block;
      }
    }
    means[i] = score * inverse_tau;
  }
}

}  // namespace

int cuda_skew(const SkewArgs<float>& a, void* stream) {
  if (a.out.rows == 0) return 0;
  PK_LAUNCH(rows_kernel, dim3(static_cast<unsigned>(ceil_div(a.out.rows, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_skew_means(const SkewMeansArgs<float>& a, void* stream) {
  if (a.lists == 0 || a.items == 0) return 0;
  PK_LAUNCH(means_kernel, dim3(static_cast<unsigned>(ceil_div(a.lists, kLists))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
