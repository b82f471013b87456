// Functions that group_preference_cpu.cpp exports once per instruction set.
#pragma once
#include "lists/group_preference.h"

namespace prefkern {

constexpr int64_t kGroupArrays = 3;  // scratch: so many arrays of G times kMostLanes

struct GroupPreferenceCpu {
  void (*rows_f32)(const GroupPreferenceArgs<float>&, float* scratch, int64_t begin, int64_t end);
  void (*rows_f64)(const GroupPreferenceArgs<double>&, double* scratch, int64_t begin, int64_t end);
};
}  // namespace prefkern
