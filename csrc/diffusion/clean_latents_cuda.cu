// The CUDA walk of clean_latents.h: a block takes a slice of a row. Of the loss a thread adds up to 32 elements in float, the
// block its threads' sums in double; the block that finishes last adds slices and rows in a fixed order.
#include "diffusion/clean_latents.h"
#include "diffusion/latents.cuh"

namespace prefkern {
namespace {

constexpr int kWarps = kLatentThreads / kWarp;

// y of every element of a run, in place of the prediction.
template <class T> struct CleanRow {
  const T *pred, *x, *target;
  bool pred_aligned, x_aligned, target_aligned;
  float c_x, c_e;

  template <class Args>
  __device__ __forceinline__ CleanRow(const Args& a, int64_t b)
      : pred(latent_row<T>(a.pred, b)),
        x(latent_row<T>(a.x, b)),
        target(latent_row<T>(a.target, b)),
        pred_aligned(rows_aligned<T>(a.pred)),
        x_aligned(rows_aligned<T>(a.x)),
        target_aligned(rows_aligned<T>(a.target)),
        c_x(float(a.coefficients[b])),
        c_e(float(a.coefficients[a.rows + b])) {}

  __device__ __forceinline__ void load(int64_t at, int64_t end, LatentPack<T>& y) const {
    LatentPack<T> of_x, of_target;
    load_elements(pred, at, end, pred_aligned, y);
    load_elements(x, at, end, x_aligned, of_x);
    load_elements(target, at, end, target_aligned, of_target);
#pragma unroll
    for (int j = 0; j < kPackSize<T>; j++) y[j] = of_x[j] * c_x + y[j] * c_e - of_target[j];
  }
};

__device__ __forceinline__ void finish(const X0LossArgs<float>& a) {
  const int64_t slices = ceil_div(a.length, kCudaSlice);
  const int lane = threadIdx.x % kWarp;
  const volatile double* from = a.sums;  // other blocks' writes: not from a stale cache line
  double total = 0;
  for (int64_t b = threadIdx.x / kWarp; b < a.rows; b += kWarps) {
    double sum = 0;
    for (int64_t i = b * slices + lane; i < (b + 1) * slices; i += kWarp) sum += from[i];
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const double loss = sum / double(a.length);
    if (a.reduction == LatentReduction::none) a.loss[b] = float(loss);
    total += loss;
  }
  __syncwarp();
  total = block_reduce<kLatentThreads>(total, 0.0, Add());
  if (threadIdx.x == 0 && a.reduction != LatentReduction::none)
    *a.loss = float(a.reduction == LatentReduction::mean ? total / double(a.rows) : total);
}

template <class T> __global__ void __launch_bounds__(kLatentThreads) loss_kernel(const X0LossArgs<float> a) {
  const LatentSlice s = latent_slice(a.length);
  const CleanRow<T> row(a, s.row);
  const float c = float(a.c);
  float sum = 0;
  each_run<T>(s, [&](int64_t at) {
    LatentPack<T> y;
    row.load(at, s.end, y);
#pragma unroll
    for (int j = 0; j < kPackSize<T>; j++) sum += at + j < s.end ? x0_loss(a.kind, y[j], c) : 0.0f;
  });
  const double total = block_reduce<kLatentThreads>(double(sum), 0.0, Add());
  if (threadIdx.x == 0) a.sums[blockIdx.x] = total;
  if (last_block(a.finished)) finish(a);
}

template <class T> __global__ void __launch_bounds__(kLatentThreads) gradient_kernel(const X0GradArgs<float> a) {
  const LatentSlice s = latent_slice(a.length);
  const CleanRow<T> row(a, s.row);
  const float c = float(a.c), factor = float(gradient_factor(a, s.row));
  T* grad = static_cast<T*>(a.grad) + s.row * a.length;
  const bool aligned = rows_aligned<T>({a.grad, a.length});
  each_run<T>(s, [&](int64_t at) {
    LatentPack<T> y;
    row.load(at, s.end, y);
#pragma unroll
    for (int j = 0; j < kPackSize<T>; j++) y[j] = x0_slope(a.kind, y[j], c) * factor;
    store_elements(grad, at, s.end, aligned, y);
  });
}

template <class T> __global__ void __launch_bounds__(kLatentThreads) step_kernel(const LatentStepArgs a) {
  const LatentSlice s = latent_slice(a.length);
  const LatentRows rows[3] = {a.x, a.e1, a.e2};
  float factor[3];
  bool aligned[3];
  for (int k = 0; k < 3; k++) {
    factor[k] = float(step_coefficient(a, k, s.row));
    aligned[k] = rows_aligned<T>(rows[k]);
  }
  T* out = static_cast<T*>(a.out) + s.row * a.length;
  const bool out_aligned = rows_aligned<T>({a.out, a.length});
  each_run<T>(s, [&](int64_t at) {
    LatentPack<T> sum = {}, v;
#pragma unroll
    for (int k = 0; k < 3; k++) {
      if (factor[k] == 0) continue;
      load_elements(latent_row<T>(rows[k], s.row), at, s.end, aligned[k], v);
#pragma unroll
      for (int j = 0; j < kPackSize<T>; j++) sum[j] += v[j] * factor[k];
    }
    store_elements(out, at, s.end, out_aligned, sum);
  });
}

dim3 grid_of(int64_t rows, int64_t length) { return dim3(static_cast<unsigned>(rows * ceil_div(length, kCudaSlice))); }

template <class T> int launch(const X0LossArgs<float>& a, cudaStream_t stream) {
  PK_LAUNCH(loss_kernel<T>, grid_of(a.rows, a.length), dim3(kLatentThreads), stream, a);
  return static_cast<int>(cudaGetLastError());
}
template <class T> int launch(const X0GradArgs<float>& a, cudaStream_t stream) {
  PK_LAUNCH(gradient_kernel<T>, grid_of(a.rows, a.length), dim3(kLatentThreads), stream, a);
  return static_cast<int>(cudaGetLastError());
}
template <class T> int launch(const LatentStepArgs& a, cudaStream_t stream) {
  PK_LAUNCH(step_kernel<T>, grid_of(a.rows, a.length), dim3(kLatentThreads), stream, a);
  return static_cast<int>(cudaGetLastError());
}

template <class Args> int run(const Args& a, void* stream) {
  if (a.rows == 0 || a.length == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::f32: return launch<float>(a, s);
    case DType::bf16: return launch<bf16_t>(a, s);
    case DType::f16: return launch<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int cuda_x0_loss(const X0LossArgs<float>& a, void* stream) { return run(a, stream); }
int cuda_x0_loss_backward(const X0GradArgs<float>& a, void* stream) { return run(a, stream); }
int cuda_latent_step(const LatentStepArgs& a, void* stream) { return run(a, stream); }

}  // namespace prefkern
