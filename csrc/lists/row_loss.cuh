// How a CUDA kernel of this room ends: the block that finishes last (an integer counter tells) adds up what all rows left, in a
// fixed order. No second launch, equal bits every time.
#pragma once
#include "core/cuda.cuh"
#include "lists/row_loss.h"

namespace prefkern {
inline namespace PK_ISA {

// Called by all threads of every block, after the block's rows have their sums.
template <int THREADS> __device__ __forceinline__ void finish_rows_on_device(const RowLoss<float>& r) {
  PK_SMEM(int, is_last, 1);
  __threadfence();  // the sums above are visible before the count is
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(r.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();

  double sums[kRowSums] = {};
  const volatile double* from = r.sums;  // other blocks' writes: not from a stale cache line
  for (int64_t b = threadIdx.x; b < r.rows; b += THREADS)
    for (int k = 0; k < kRowSums; k++) sums[k] += from[b * kRowSums + k];
  for (int k = 0; k < kRowSums; k++) sums[k] = block_reduce<THREADS>(sums[k], 0.0, Add());
  if (threadIdx.x != 0) return;
  const bool has_norm = r.norm >= 0 || r.norm_tensor;
  const double norm = r.norm_tensor ? double(*r.norm_tensor) : r.norm;
  const double divisor = row_divisor(r.reduction, has_norm, norm, sums[kRowCounts]);
  *r.loss = float(row_quotient(sums[kRowLoss], divisor));
  *r.inverse = float(row_quotient(1, divisor));
  r.metrics[kMetricCount] = float(sums[kRowCounts]);
  r.metrics[kMetricFirst] = float(row_quotient(sums[kRowFirst], sums[kRowCounts]));
  r.metrics[kMetricSecond] = float(row_quotient(sums[kRowSecond], sums[kRowCounts]));
}

// One thread of a row.
__device__ __forceinline__ void leave_row(const RowLoss<float>& r, int64_t row, double loss, double counts, double first,
                                          double second) {
  double* to = r.sums + row * kRowSums;
  to[kRowLoss] = loss;
  to[kRowCounts] = counts;
  to[kRowFirst] = first;
  to[kRowSecond] = second;
  if (r.losses) r.losses[row] = float(loss);
}

}  // namespace PK_ISA
}  // namespace prefkern
