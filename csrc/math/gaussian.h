// Covariance functions of Gaussian processes, as functions of the squared distance r2 of two points in units of the length
// scale, with variance 1. Exactly 1 at distance 0; 0 where the exponential is below the normal range of double.
//
// V is double, or on the CPU a vector of it.
#pragma once
#include "core/elementary_more.h"

namespace prefkern {

enum class GpKernel : int32_t { rbf = 0, matern12 = 1, matern32 = 2, matern52 = 3 };
constexpr int64_t kGpKernels = 4;

struct RankOneStep {
  double p, beta, keep, add;
};

inline namespace PK_ISA {

constexpr double kSqrt3 = 1.7320508075688772, kSqrt5 = 2.23606797749979;

template <GpKernel kind, class V> PK_HD V covariance(V r2) {
  if constexpr (kind == GpKernel::rbf) {
    return vexp_falling(r2 * -0.5);
  } else {
    const V far = r2 > 1e300 ? V{} + 1e300 : r2, r = vsqrt(far);  // infinity times 0 would be NaN
    if constexpr (kind == GpKernel::matern12) return vexp_falling(-r);
    else if constexpr (kind == GpKernel::matern32) return (r * kSqrt3 + 1) * vexp_falling(r * -kSqrt3);
    else return (far * (5.0 / 3) + r * kSqrt5 + 1) * vexp_falling(r * -kSqrt5);
  }
}

template <class V> PK_HD V covariance(GpKernel kind, V r2) {
  switch (kind) {
    case GpKernel::rbf: return covariance<GpKernel::rbf>(r2);
    case GpKernel::matern12: return covariance<GpKernel::matern12>(r2);
    case GpKernel::matern32: return covariance<GpKernel::matern32>(r2);
    case GpKernel::matern52: return covariance<GpKernel::matern52>(r2);
  }
  return r2;
}

// What is left of a variance, at least 0. NaN stays.
template <class V> PK_HD V variance_left(V prior, V explained) {
  const V left = prior - explained;
  return left < 0 ? V{} : left;
}

// ---- A = L L^T becomes A + sigma w w^T ---------------------------------------------------------------------------------
// With p = L^-1 w and beta_j = 1 + sigma (p_0^2 + ... + p_j^2), of column j the diagonal is multiplied by `keep`, and what is
// below it, where w_i is what is left of w after j + 1 steps of the solution, becomes keep L_ij + add w_i. A + sigma w w^T is
// positive definite if every beta is positive.
PK_HD RankOneStep rank_one_step(double sigma, double p, double beta_before) {
  const double beta = beta_before + sigma * p * p, keep = vsqrt(beta / beta_before);
  return {p, beta, keep, keep * sigma * p / beta};
}

}  // namespace PK_ISA
}  // namespace prefkern
