// CPU entry points: pick the instruction set, and the walk that the order of the ids allows.
#include "advantages/group_stats.h"

#include <atomic>
#include <cmath>

#include "advantages/group_stats_cpu.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(GroupStatsCpu, group_stats_cpu)

namespace {

constexpr int64_t kRowsPerTask = 1 << 15;

template <class S>
int64_t run(const GroupArgs<S>& args, bool (*runs)(const GroupArgs<S>&, int64_t, int64_t),
            bool (*scattered)(const GroupArgs<S>&)) {
  bool finite = true;
  if (group_stats_cpu().ascending(args.group, args.count)) {
    std::atomic<bool> all{true};
    parallel_for(0, args.count, kRowsPerTask, [&](int64_t begin, int64_t end) {
      if (!runs(args, begin, end)) all = false;
    });
    finite = all;
  } else {
    finite = scattered(args);
  }
  if (finite) return -1;
  for (int64_t i = 0; i < args.count; i++)
    if (!std::isfinite(args.rewards[i])) return i;
  return -1;  // finite doubles whose sum overflows: the group is NaN
}

}  // namespace

int64_t cpu_group_advantages(const GroupArgs<float>& args) {
  return run(args, group_stats_cpu().runs_f32, group_stats_cpu().scattered_f32);
}
int64_t cpu_group_advantages(const GroupArgs<double>& args) {
  return run(args, group_stats_cpu().runs_f64, group_stats_cpu().scattered_f64);
}

}  // namespace prefkern
