// CPU entry points: pick the instruction set, sort the rows of each group by sign, share the groups out over torch's
// threads.
#include "conflicts/runs.h"

#include <algorithm>
#include <vector>

#include "conflicts/runs_cpu.h"
#include "core/groups.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(RunsCpu, runs_cpu)

namespace {

constexpr int64_t kTokensPerTask = 1 << 16;

int64_t tasks_grain(const SequenceLayout& layout, int64_t tasks) {
  return std::max<int64_t>(1, kTokensPerTask * tasks / std::max<int64_t>(1, layout.tokens));
}

template <class T> int row_sign(const ConflictArgs<T>& a, int64_t row) {
  if (a.advantages64) return (a.advantages64[row] > 0) - (a.advantages64[row] < 0);
  return (a.advantages[row] > 0) - (a.advantages[row] < 0);
}

template <class T>
void group_runs(const ConflictArgs<T>& a, void (*runs)(ConflictRow<T>*, int64_t, int64_t, bool), const int64_t* members,
                int64_t count) {
  std::vector<int64_t> order;  // of the active rows, those with a positive sign first
  order.reserve(count);
  for (int64_t k = 0; k < count; k++) {
    a.forward[members[k]] = a.backward[members[k]] = 0;
    if (row_sign(a, members[k]) > 0) order.push_back(members[k]);
  }
  const auto positives = static_cast<int64_t>(order.size());
  for (int64_t k = 0; k < count; k++)
    if (row_sign(a, members[k]) < 0) order.push_back(members[k]);
  const auto active = static_cast<int64_t>(order.size());
  if (positives == 0 || positives == active) return;
  std::vector<ConflictRow<T>> rows(active);
  for (int64_t k = 0; k < active; k++) rows[k] = {a.tokens + sequence_begin(a.layout, order[k]), a.length[order[k]], 0, 0};
  for (const bool backward : {false, true}) {
    runs(rows.data(), positives, active, backward);
    for (int64_t k = 0; k < active; k++) (backward ? a.backward : a.forward)[order[k]] = rows[k].run;
  }
}

template <class T> int64_t run(const ConflictArgs<T>& a, void (*runs)(ConflictRow<T>*, int64_t, int64_t, bool)) {
  const int64_t count = a.layout.sequences;
  parallel_for(0, count, tasks_grain(a.layout, count),
               [&](int64_t begin, int64_t end) { runs_cpu().lengths(a.layout, a.mask, a.length, begin, end); });
  const int64_t* bad = std::find_if(a.length, a.length + count, [](int64_t n) { return n < 0; });
  if (bad != a.length + count) return bad - a.length;
  const GroupIndex index = group_index(a.group, count);
  parallel_for(0, index.groups(), tasks_grain(a.layout, index.groups()), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      group_runs(a, runs, &index.order[index.offsets[g]], index.offsets[g + 1] - index.offsets[g]);
  });
  return -1;
}

template <class S>
void run_weights(const ConflictWeightArgs<S>& a, void (*weights)(const ConflictWeightArgs<S>&, int64_t, int64_t)) {
  parallel_for(0, a.layout.sequences, tasks_grain(a.layout, a.layout.sequences),
               [&](int64_t begin, int64_t end) { weights(a, begin, end); });
}

}  // namespace

int64_t cpu_conflict_runs(const ConflictArgs<int32_t>& args) { return run(args, runs_cpu().runs_i32); }
int64_t cpu_conflict_runs(const ConflictArgs<int64_t>& args) { return run(args, runs_cpu().runs_i64); }
void cpu_conflict_weights(const ConflictWeightArgs<float>& args) { run_weights(args, runs_cpu().weights_f32); }
void cpu_conflict_weights(const ConflictWeightArgs<double>& args) { run_weights(args, runs_cpu().weights_f64); }

}  // namespace prefkern
