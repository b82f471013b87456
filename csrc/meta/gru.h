// A gated recurrent unit that runs from the last step of B rows to the first and forgets what is behind a terminal step, forward and
// backward, for the CPU and for CUDA. The gates' inputs come as they are, so that the product with the network's input is one for
// all steps; what a step needs is the product with the state of the step behind it. Formula: math/meta.h; order of gates: r, z, n.
//
// On the CPU a task takes some rows through all steps, while their states are in its cache. On CUDA one launch is one step of all
// rows, and the caller multiplies in between.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/meta.h"

namespace prefkern {

template <class S> struct GruArgs {
  int64_t rows = 0, steps = 0, hidden = 0;  // B, T, H
  const S* gates = nullptr;  // [B, T, 3H]
  const uint8_t* done = nullptr;  // [B, T]; 1: nothing from behind this step reaches it. null: no step is terminal
  const S* bias = nullptr;  // [H], of the product inside n
  S* out = nullptr;  // [B, T, H]; backward: what the forward has left there
  S* saved = nullptr;  // [B, T, 4H]: u, z, n, m; forward: null where nobody asks. Backward: reads it
  // Of one step, on the CPU for the rows of a task. Forward: U h [B, 3H], and h as step t - 1 takes it [B, H]. Backward: what comes
  // from step t - 1, through its products and past them, [B, H] both.
  S *product = nullptr, *carry = nullptr;
  int64_t step = 0;  // CUDA: which one
  // Backward.
  const S* grad_out = nullptr;  // [B, T, H]
  S* grad_gates = nullptr;  // [B, T, 3H]
  S* grad_inner = nullptr;  // [B, T, H], by m
  S* before = nullptr;  // [B, T, H]: h as the step took it
  // CPU.
  const S* weight = nullptr;  // U, [3H, H]
  const S* weight_transposed = nullptr;  // forward: [H, 3H]
};

PK_API void cpu_gru_forward(const GruArgs<float>& args);
PK_API void cpu_gru_forward(const GruArgs<double>& args);
PK_API void cpu_gru_backward(const GruArgs<float>& args);
PK_API void cpu_gru_backward(const GruArgs<double>& args);
// Sums of the columns of a matrix [rows, columns], in one order whatever the threads.
template <class S> struct ColumnSumArgs {
  int64_t rows = 0, columns = 0;
  const S* values = nullptr;
  S* sums = nullptr;
};
PK_API void cpu_column_sums(const ColumnSumArgs<float>& args);
PK_API void cpu_column_sums(const ColumnSumArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. Steps go down from the last forward, and up from 0 backward; at the first of them
// `product` and `carry` hold 0.
PK_API int cuda_gru_forward_step(const GruArgs<float>& args, void* stream);
PK_API int cuda_gru_backward_step(const GruArgs<float>& args, void* stream);
PK_API int cuda_column_sums(const ColumnSumArgs<float>& args, void* stream);

}  // namespace prefkern
