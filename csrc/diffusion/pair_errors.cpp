// CPU entry points of pair_errors.h: pick the instruction set, share the slices out over torch's threads, and finish in the order
// of the pairs and their slices.
#include "diffusion/pair_errors.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "diffusion/pair_errors_cpu.h"

namespace prefkern {

PK_ISA_TABLE(PairErrorsCpu, pair_errors_cpu)

namespace {

template <class Args> void run(const Args& args, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t slices = ceil_div(args.length, kCpuSlice);
  const int64_t grain = std::max<int64_t>(1, kCpuSlice / std::max<int64_t>(1, args.length));
  parallel_for(0, args.pairs * slices, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

template <class S> void finish(const DiffusionPairArgs<S>& a) {
  const int64_t slices = ceil_div(a.length, kCpuSlice);
  PairTotals totals;
  for (int64_t b = 0; b < a.pairs; b++) {
    double sums[kDiffusionSums] = {};
    for (int64_t i = b * slices; i < (b + 1) * slices; i++)
      for (int k = 0; k < kDiffusionSums; k++) sums[k] += a.sums[i * kDiffusionSums + k];
    if (a.errors) {
      a.errors[b] = sums[kSquareW] / double(a.length);
      continue;
    }
    const PairResult<S> r = pair_result(a, b, sums);
    a.slopes[b] = S(r.term.slope);
    if (a.reduction == LatentReduction::none) a.loss[b] = S(r.term.loss);
    add_pair(totals, r);
  }
  if (!a.errors) finish_pairs(a, totals);
}

}  // namespace

void cpu_diffusion_pairs(const DiffusionPairArgs<float>& args) {
  if (args.pairs == 0) return;
  run(args, pair_errors_cpu().sums_f32);
  finish(args);
}
void cpu_diffusion_pairs(const DiffusionPairArgs<double>& args) {
  if (args.pairs == 0) return;
  run(args, pair_errors_cpu().sums_f64);
  finish(args);
}
void cpu_diffusion_pairs_backward(const DiffusionGradArgs<float>& args) { run(args, pair_errors_cpu().gradient_f32); }
void cpu_diffusion_pairs_backward(const DiffusionGradArgs<double>& args) { run(args, pair_errors_cpu().gradient_f64); }

}  // namespace prefkern
