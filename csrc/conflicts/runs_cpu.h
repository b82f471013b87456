// Functions that runs_cpu.cpp exports once per instruction set.
#pragma once
#include "conflicts/runs.h"

namespace prefkern {

// An active row on its way through one direction.
template <class T> struct ConflictRow {
  const T* tokens;
  int64_t length, run;
  uint64_t agreed;  // which of the next 64 tokens some row of the other sign has too
};

struct RunsCpu {
  // Lengths of the rows [begin, end); -1 where the mask has a hole.
  void (*lengths)(const SequenceLayout& layout, const uint8_t* mask, int64_t* length, int64_t begin, int64_t end);
  // Runs of one group, whose first `positives` rows have one sign, the others the other.
  void (*runs_i32)(ConflictRow<int32_t>* rows, int64_t positives, int64_t count, bool backward);
  void (*runs_i64)(ConflictRow<int64_t>* rows, int64_t positives, int64_t count, bool backward);
  // Weights of the rows [begin, end).
  void (*weights_f32)(const ConflictWeightArgs<float>&, int64_t begin, int64_t end);
  void (*weights_f64)(const ConflictWeightArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
