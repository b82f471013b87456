// Functions that moments_cpu.cpp exports once per instruction set.
#pragma once
#include "advantages/moments.h"

namespace prefkern {
struct MomentsCpu {
  // Of elements [begin, end).
  Moments (*part_f32)(const MomentsArgs<float>&, int64_t begin, int64_t end);
  Moments (*part_f64)(const MomentsArgs<double>&, int64_t begin, int64_t end);
  void (*normalize_f32)(const BatchNormalizeArgs<float>&, const Affine&, int64_t begin, int64_t end);
  void (*normalize_f64)(const BatchNormalizeArgs<double>&, const Affine&, int64_t begin, int64_t end);
};
}  // namespace prefkern
