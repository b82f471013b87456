// Functions that inner_loss_cpu.cpp exports once per instruction set, over the blocks [begin, end) of rows.
#pragma once
#include "meta/inner_loss.h"

namespace prefkern {

struct InnerLossCpu {
  void (*loss_f32)(const LpgArgs<float>&, int64_t begin, int64_t end);
  void (*loss_f64)(const LpgArgs<double>&, int64_t begin, int64_t end);
  void (*gradients_f32)(const LpgArgs<float>&, int64_t begin, int64_t end);
  void (*gradients_f64)(const LpgArgs<double>&, int64_t begin, int64_t end);
  void (*second_f32)(const LpgArgs<float>&, int64_t begin, int64_t end);
  void (*second_f64)(const LpgArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
