// The loss of a predicted clean latent with its gradient in the prediction, and steps between noise levels, for the CPU and for
// CUDA. Formulas: math/diffusion.h. What a schedule says of a row are two or three numbers, in double: they come of differences
// that cancel.
//
// S is the type of results: float for latents of float, bf16 and f16; double for those of double, on the CPU.
#pragma once
#include "diffusion/latents.h"
#include "math/diffusion.h"

namespace prefkern {

// y = c_x x + c_e pred - target of every element; the loss of a row is the mean over its elements.
template <class S> struct X0LossArgs {
  X0Kind kind = X0Kind::huber;
  double c = 1e-3;
  LatentReduction reduction = LatentReduction::mean;
  DType dtype = DType::f32;
  int64_t rows = 0, length = 0;  // B, D
  LatentRows pred, x, target;
  const double* coefficients = nullptr;  // c_x [B], c_e [B]
  double* sums = nullptr;  // scratch [B, slices]
  S* loss = nullptr;  // [1], or [B] without a reduction
  uint32_t* finished = nullptr;  // CUDA: a counter that must be 0
};

// grad = c_e slope(y) upstream share / D.
template <class S> struct X0GradArgs {
  X0Kind kind = X0Kind::huber;
  double c = 1e-3;
  DType dtype = DType::f32;
  int64_t rows = 0, length = 0;
  LatentRows pred, x, target;
  const double* coefficients = nullptr;
  bool per_row = false;
  double share = 1;  // 1 / B for a mean
  const S* upstream = nullptr;  // [B] or [1]
  void* grad = nullptr;  // [B, D] of the latents' type
};

// out = c_0 x + c_1 e1 + c_2 e2. What has the coefficient 0 is not read.
struct LatentStepArgs {
  DType dtype = DType::f32;
  int64_t rows = 0, length = 0;
  LatentRows x, e1, e2;  // e2 may be null
  const double* coefficients = nullptr;  // [3, B]; [2, B] without e2
  void* out = nullptr;  // [B, D]
};

PK_API void cpu_x0_loss(const X0LossArgs<float>& args);
PK_API void cpu_x0_loss(const X0LossArgs<double>& args);
PK_API void cpu_x0_loss_backward(const X0GradArgs<float>& args);
PK_API void cpu_x0_loss_backward(const X0GradArgs<double>& args);
PK_API void cpu_latent_step(const LatentStepArgs& args);

// Enqueue; return a cudaError_t.
PK_API int cuda_x0_loss(const X0LossArgs<float>& args, void* stream);
PK_API int cuda_x0_loss_backward(const X0GradArgs<float>& args, void* stream);
PK_API int cuda_latent_step(const LatentStepArgs& args, void* stream);

inline namespace PK_ISA {
template <class S> PK_HD double gradient_factor(const X0GradArgs<S>& a, int64_t b) {
  return a.coefficients[a.rows + b] * double(a.upstream[a.per_row ? b : 0]) * a.share / double(a.length);
}
// 0 for what is not there.
PK_HD double step_coefficient(const LatentStepArgs& a, int64_t k, int64_t b) {
  return k == 2 && !a.e2.data ? 0 : a.coefficients[k * a.rows + b];
}
}  // namespace PK_ISA

}  // namespace prefkern
