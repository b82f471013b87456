// Functions that group_stats_cpu.cpp exports once per instruction set.
#pragma once
#include "advantages/group_stats.h"

namespace prefkern {

enum class RunsResult : int32_t { done, not_finite, not_ascending };

template <class S> struct GroupStatsWalks {
  // Runs of equal ids that begin in [begin, end); they may reach beyond. Ids must ascend: looked at on the way.
  RunsResult (*runs)(const GroupArgs<S>&, int64_t begin, int64_t end);
  // Ids in any order. False if a reward is not finite.
  bool (*scattered)(const GroupArgs<S>&);
  // Any rule: groups [begin, end) of a GroupIndex. False if one has no tokens to weigh by.
  bool (*listed)(const GroupArgs<S>&, const int64_t* order, const int64_t* offsets, int64_t begin, int64_t end);
  // The batch stage: moments of rows [begin, end), and their results.
  Moments (*batch_moments)(const GroupArgs<S>&, int64_t begin, int64_t end);
  void (*batch_results)(const GroupArgs<S>&, const Affine&, int64_t begin, int64_t end);
};

struct GroupStatsCpu {
  GroupStatsWalks<float> f32;
  GroupStatsWalks<double> f64;
};

}  // namespace prefkern
