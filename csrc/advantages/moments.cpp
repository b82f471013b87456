// CPU entry points: pick the instruction set, share the work out in parts of a fixed size, merge them in order.
#include "advantages/moments.h"

#include <algorithm>
#include <vector>

#include "advantages/moments_cpu.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(MomentsCpu, moments_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 16;

template <class S>
void run_moments(const MomentsArgs<S>& args, Moments (*part)(const MomentsArgs<S>&, int64_t, int64_t)) {
  std::vector<Moments> parts(ceil_div(args.count, kMomentsPart));
  parallel_for(0, static_cast<int64_t>(parts.size()), kElementsPerTask / kMomentsPart, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) parts[p] = part(args, p * kMomentsPart, std::min(args.count, (p + 1) * kMomentsPart));
  });
  Moments all;
  for (const Moments& m : parts) all = merge(all, m);
  write_moments(args.moments, all);
}

template <class S>
void run_normalize(const BatchNormalizeArgs<S>& args,
                   void (*normalize)(const BatchNormalizeArgs<S>&, const Affine&, int64_t, int64_t)) {
  const Affine f = batch_affine(args.mode, read_moments(args.moments), args.eps);
  parallel_for(0, args.count, kElementsPerTask, [&](int64_t begin, int64_t end) { normalize(args, f, begin, end); });
}

}  // namespace

void cpu_batch_moments(const MomentsArgs<float>& args) { run_moments(args, moments_cpu().part_f32); }
void cpu_batch_moments(const MomentsArgs<double>& args) { run_moments(args, moments_cpu().part_f64); }
void cpu_merge_moments(const MergeArgs& args) {
  Moments all;
  for (int64_t p = 0; p < args.count; p++) all = merge(all, read_moments(args.parts + 3 * p));
  write_moments(args.moments, all);
}
void cpu_batch_normalize(const BatchNormalizeArgs<float>& args) { run_normalize(args, moments_cpu().normalize_f32); }
void cpu_batch_normalize(const BatchNormalizeArgs<double>& args) { run_normalize(args, moments_cpu().normalize_f64); }

}  // namespace prefkern
