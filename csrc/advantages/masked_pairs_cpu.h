// Functions that masked_pairs_cpu.cpp exports once per instruction set.
#pragma once
#include "advantages/masked_pairs.h"

namespace prefkern {
struct MaskedPairsCpu {
  // Groups [begin, end) of a GroupIndex, into `values`, `kept` and `masked`.
  void (*f32)(const MaskedPairArgs<float>&, const int64_t* order, const int64_t* offsets, int64_t begin, int64_t end);
  void (*f64)(const MaskedPairArgs<double>&, const int64_t* order, const int64_t* offsets, int64_t begin, int64_t end);
};
}  // namespace prefkern
