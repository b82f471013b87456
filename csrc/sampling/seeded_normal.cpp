// CPU entry points: pick the instruction set, share the elements out over torch's threads.
#include "sampling/seeded_normal.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "sampling/seeded_normal_cpu.h"

namespace prefkern {

PK_ISA_TABLE(SeededNormalCpu, seeded_normal_cpu)

namespace {

// Elements are shared out in pieces of this size; so many numbers are made in less time than a task takes to hand over.
constexpr int64_t kPiece = 1024, kNumbersPerTask = 1 << 13;

template <class S> void run(const NormalArgs<S>& a, void (*part)(const NormalArgs<S>&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kNumbersPerTask / (kPiece * std::max<int64_t>(1, a.rows)));
  parallel_for(0, ceil_div(a.count, kPiece), grain,
               [&](int64_t first, int64_t last) { part(a, first * kPiece, std::min(last * kPiece, a.count)); });
}

}  // namespace

void cpu_seeded_normal(const NormalArgs<float>& args) { run(args, seeded_normal_cpu().f32); }
void cpu_seeded_normal(const NormalArgs<double>& args) { run(args, seeded_normal_cpu().f64); }
void cpu_philox_words(const PhiloxArgs& args) { seeded_normal_cpu().words(args, 0, args.blocks); }

}  // namespace prefkern
