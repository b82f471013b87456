// CPU entry points: the groups as lists of rows, the instruction set, and what is left of the batch.
#include "advantages/masked_pairs.h"

#include "advantages/masked_pairs_cpu.h"
#include "core/groups.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(MaskedPairsCpu, masked_pairs_cpu)

namespace {

constexpr int64_t kGroupsPerTask = 64;

template <class S, class Walk> void run(const MaskedPairArgs<S>& args, Walk walk) {
  if (args.count == 0) return;
  const GroupIndex index = group_index(args.group, args.count);
  parallel_for(0, index.groups(), kGroupsPerTask,
               [&](int64_t begin, int64_t end) { walk(args, index.order.data(), index.offsets.data(), begin, end); });
  double out = 0;
  if (args.renormalise)
    for (int64_t i = 0; i < args.count; i++) out += args.masked[i] > 0 && !args.kept[i];
  const double factor = renormalisation(double(args.count), out);
  for (int64_t i = 0; i < args.count; i++) args.advantages[i] = S(args.values[i] * factor);
}

}  // namespace

void cpu_masked_pairs(const MaskedPairArgs<float>& args) { run(args, masked_pairs_cpu().f32); }
void cpu_masked_pairs(const MaskedPairArgs<double>& args) { run(args, masked_pairs_cpu().f64); }

}  // namespace prefkern
