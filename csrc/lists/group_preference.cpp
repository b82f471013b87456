// CPU entry points of group_preference.h: pick the instruction set, share the rows out over torch's threads.
#include "lists/group_preference.h"

#include <algorithm>
#include <memory>

#include "core/isa.h"
#include "core/parallel.h"
#include "lists/group_preference_cpu.h"

namespace prefkern {

PK_ISA_TABLE(GroupPreferenceCpu, group_preference_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

template <class S, class Body> void run(const GroupPreferenceArgs<S>& args, Body body) {
  const int64_t items = std::max<int64_t>(1, args.items);
  const int64_t grain = std::max<int64_t>(kMostLanes, kElementsPerTask / items / kMostLanes * kMostLanes);
  parallel_for(0, args.out.rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<S[]> scratch(new S[kGroupArrays * kMostLanes * items]);
    body(args, scratch.get(), begin, end);
  });
  finish_rows(args.out);
}

}  // namespace

void cpu_group_preference(const GroupPreferenceArgs<float>& args) { run(args, group_preference_cpu().rows_f32); }
void cpu_group_preference(const GroupPreferenceArgs<double>& args) { run(args, group_preference_cpu().rows_f64); }

}  // namespace prefkern
