// The CPU walk of gp_posterior.h: a candidate per lane, three vectors of them at a time. Four rows of the triangular solution
// share each load of v, so that the loop over what is solved already, where the time goes, is bound by multiply-adds. A candidate
// meets the same operations wherever it is, so its result does not depend on its neighbours.
#include "gaussian/gp_posterior_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kVectors = 3, kRows = 4;
constexpr int64_t kTile = kVectors * kWide;

PK_HD VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PK_HD void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }

// Candidates first to first + count; a lane without one gets the first of them, and what comes of it is dropped.
void transpose(const GpPosteriorArgs& a, double* x, int64_t first, int64_t count) {
  for (int64_t lane = 0; lane < kTile; lane++) {
    const double* from = a.inputs + (first + (lane < count ? lane : 0)) * a.dims;
    for (int64_t d = 0; d < a.dims; d++) x[d * kTile + lane] = from[d];
  }
}

template <GpKernel kind> PK_HD void kernel_row(const GpPosteriorArgs& a, const double* x, int64_t point, VecD* row) {
  VecD r2[kVectors] = {};
  const double* u = a.unique + point * a.dims;
  for (int64_t d = 0; d < a.dims; d++) {
    const double inverse = a.inverse_length[d * a.length_step];
#pragma GCC unroll 3
    for (int t = 0; t < kVectors; t++) {
      const VecD difference = (load(x + d * kTile + t * kWide) - u[d]) * inverse;
      r2[t] += difference * difference;
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < kVectors; t++) row[t] = covariance<kind>(r2[t]) * a.variance;
}

template <GpKernel kind> void one_tile(const GpPosteriorArgs& a, const double* scale, const double* x, double* v, VecD* mean,
                                       VecD* explained) {
  for (int64_t i = 0; i < a.points; i += kRows) {
    const int64_t rows = a.points - i < kRows ? a.points - i : kRows;
    const double* l[kRows];
    for (int r = 0; r < kRows; r++) l[r] = a.factor + (i + (r < rows ? r : 0)) * a.stride;
    VecD sum[kRows][kVectors] = {};
    for (int64_t j = 0; j < i; j++) {
      VecD solved[kVectors];
#pragma GCC unroll 3
      for (int t = 0; t < kVectors; t++) solved[t] = load(v + j * kTile + t * kWide);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const VecD entry = splat_wide(l[r][j]);
#pragma GCC unroll 3
        for (int t = 0; t < kVectors; t++) sum[r][t] += entry * solved[t];
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      VecD row[kVectors];
      kernel_row<kind>(a, x, i + r, row);
      for (int t = 0; t < kVectors; t++) {
        VecD value = (scale ? row[t] * scale[i + r] : row[t]) - sum[r][t];
        for (int64_t c = 0; c < r; c++) value -= l[r][i + c] * load(v + (i + c) * kTile + t * kWide);
        value /= l[r][i + r];
        store(v + (i + r) * kTile + t * kWide, value);
        mean[t] += value * a.weights[i + r];
        explained[t] += value * value;
      }
    }
  }
}

void posterior(const GpPosteriorArgs& a, const double* scale, double* scratch, int64_t begin, int64_t end) {
  double *x = scratch, *v = scratch + a.dims * kTile;
  const auto walk = [&] {
    switch (a.kernel) {
      case GpKernel::rbf: return &one_tile<GpKernel::rbf>;
      case GpKernel::matern12: return &one_tile<GpKernel::matern12>;
      case GpKernel::matern32: return &one_tile<GpKernel::matern32>;
      case GpKernel::matern52: break;
    }
    return &one_tile<GpKernel::matern52>;
  }();
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t first = tile * kTile, count = a.candidates - first < kTile ? a.candidates - first : kTile;
    transpose(a, x, first, count);
    VecD mean[kVectors] = {}, explained[kVectors] = {};
    walk(a, scale, x, v, mean, explained);
    for (int64_t t = 0; t < kVectors && t * kWide < count; t++) {
      const int64_t left = count - t * kWide, lanes = left < kWide ? left : kWide;
      store_wide(a.mean + first + t * kWide, mean[t], lanes);
      store_wide(a.var + first + t * kWide, variance_left(splat_wide(a.variance), explained[t]), lanes);
    }
  }
}

}  // namespace

extern const GpPosteriorCpu gp_posterior_cpu;
const GpPosteriorCpu gp_posterior_cpu = {kTile, &posterior};

}  // namespace PK_ISA
}  // namespace prefkern
