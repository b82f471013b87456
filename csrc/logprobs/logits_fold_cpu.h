// Functions that logits_fold_cpu.cpp exports once per instruction set.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {
struct LogitsFoldCpu {
  void (*fold_f32)(const FoldArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*fold_f64)(const FoldArgs<double>&, int64_t row_begin, int64_t row_end);
  void (*grad_f32)(const GradArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*grad_f64)(const GradArgs<double>&, int64_t row_begin, int64_t row_end);
};
}  // namespace prefkern
