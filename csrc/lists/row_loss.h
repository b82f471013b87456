// Losses of rows, lists or pairs, made into one number with its metrics, and their gradient: what the losses of this room end
// with. Sums are added in double, in a fixed order.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/lists.h"

namespace prefkern {

constexpr int64_t kMostLanes = 16;  // of any instruction set

template <class S> struct RowLoss {
  int64_t rows = 0;
  RowReduction reduction = RowReduction::mean;
  double norm = -1;                // in place of the number of rows that count; negative for none
  const S* norm_tensor = nullptr;  // [1], likewise
  double* sums = nullptr;          // [rows, kRowSums] of scratch
  S* losses = nullptr;             // [rows], for no reduction; else null
  S *loss = nullptr, *metrics = nullptr, *inverse = nullptr;  // [1], [kRowMetrics], [1]: 1 over the divisor
  uint32_t* finished = nullptr;    // CUDA: a counter that must be 0
};

// unnormalised times the row's, or the only, upstream gradient and the inverse divisor.
template <class S> struct RowGradArgs {
  int64_t rows = 0, columns = 0;
  bool per_row = false;
  const S *unnormalised = nullptr, *upstream = nullptr, *inverse = nullptr;  // [rows, columns], [rows] or [1], [1]
  S* grad = nullptr;
};

void finish_rows(const RowLoss<float>& rows);
void finish_rows(const RowLoss<double>& rows);

PK_API void cpu_row_gradient(const RowGradArgs<float>& args);
PK_API void cpu_row_gradient(const RowGradArgs<double>& args);
PK_API int cuda_row_gradient(const RowGradArgs<float>& args, void* stream);  // enqueues; returns a cudaError_t

}  // namespace prefkern
