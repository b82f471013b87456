// Functions that token_loss_cpu.cpp exports once per instruction set.
#pragma once
#include "policy/token_loss.h"

namespace prefkern {
struct TokenLossCpu {
  // sums: [sequences, kPolicySums].
  void (*sequences_f32)(const PolicyArgs<float>&, double* sums, int64_t begin, int64_t end);
  void (*sequences_f64)(const PolicyArgs<double>&, double* sums, int64_t begin, int64_t end);
  void (*backward_f32)(const PolicyGradArgs<float>&, int64_t begin, int64_t end);
  void (*backward_f64)(const PolicyGradArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
