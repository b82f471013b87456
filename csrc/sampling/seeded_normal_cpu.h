// Functions that seeded_normal_cpu.cpp exports once per instruction set: elements, or blocks of four words, [begin, end).
#pragma once
#include "sampling/seeded_normal.h"

namespace prefkern {
struct SeededNormalCpu {
  void (*f32)(const NormalArgs<float>&, int64_t begin, int64_t end);
  void (*f64)(const NormalArgs<double>&, int64_t begin, int64_t end);
  void (*words)(const PhiloxArgs&, int64_t begin, int64_t end);
};
}  // namespace prefkern
