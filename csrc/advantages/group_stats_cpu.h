// Functions that group_stats_cpu.cpp exports once per instruction set.
#pragma once
#include "advantages/group_stats.h"

namespace prefkern {
struct GroupStatsCpu {
  bool (*ascending)(const int64_t* ids, int64_t count);
  // Runs of equal ids that begin in [begin, end); they may reach beyond. False if a reward is not finite.
  bool (*runs_f32)(const GroupArgs<float>&, int64_t begin, int64_t end);
  bool (*runs_f64)(const GroupArgs<double>&, int64_t begin, int64_t end);
  // Ids in any order.
  bool (*scattered_f32)(const GroupArgs<float>&);
  bool (*scattered_f64)(const GroupArgs<double>&);
};
}  // namespace prefkern
