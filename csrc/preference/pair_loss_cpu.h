// Functions that pair_loss_cpu.cpp exports once per instruction set.
#pragma once
#include "preference/pair_loss.h"

namespace prefkern {
struct PairLossCpu {
  // sums: [kPreferenceSums], of these pairs.
  void (*pairs_f32)(const PreferenceArgs<float>&, double* sums, int64_t begin, int64_t end);
  void (*pairs_f64)(const PreferenceArgs<double>&, double* sums, int64_t begin, int64_t end);
  void (*backward_f32)(const PreferenceGradArgs<float>&, int64_t begin, int64_t end);
  void (*backward_f64)(const PreferenceGradArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
