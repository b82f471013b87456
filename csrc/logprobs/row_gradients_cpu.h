// Functions that row_gradients_cpu.cpp exports once per instruction set.
#pragma once
#include "logprobs/row_gradients.h"

namespace prefkern {
struct RowGradientsCpu {
  void (*weigh_f32)(const WeighArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*weigh_f64)(const WeighArgs<double>&, int64_t row_begin, int64_t row_end);
  void (*finish_f32)(const RowGradientArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*finish_f64)(const RowGradientArgs<double>&, int64_t row_begin, int64_t row_end);
  void (*backward_f32)(const RowBackwardArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*backward_f64)(const RowBackwardArgs<double>&, int64_t row_begin, int64_t row_end);
};
}  // namespace prefkern
