// Functions that sequence_sums_cpu.cpp exports once per instruction set.
#pragma once
#include "sequence/sequence_sums.h"

namespace prefkern {
struct SequenceSumsCpu {
  void (*forward_f32)(const SequenceSumArgs<float>&, int64_t begin, int64_t end);
  void (*forward_f64)(const SequenceSumArgs<double>&, int64_t begin, int64_t end);
  void (*backward_f32)(const SequenceSumArgs<float>&, int64_t begin, int64_t end);
  void (*backward_f64)(const SequenceSumArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
