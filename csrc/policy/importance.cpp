// CPU entry points: pick the instruction set, share the sequences out over torch's threads, join their sums in order.
#include "policy/importance.h"

#include <algorithm>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "policy/importance_cpu.h"

namespace prefkern {

PK_ISA_TABLE(ImportanceCpu, importance_cpu)

namespace {

constexpr int64_t kTokensPerTask = 1 << 14;

int64_t sequences_per_task(const SequenceLayout& l) {
  return std::max<int64_t>(1, kTokensPerTask * l.sequences / std::max<int64_t>(1, l.tokens));
}

template <class S, class Body, class Scale> void run(const WeightArgs<S>& args, Body body, Scale scale) {
  const int64_t count = args.layout.sequences;
  std::vector<double> sums(2 * count);
  parallel_for(0, count, sequences_per_task(args.layout), [&](int64_t b, int64_t e) { body(args, sums.data(), b, e); });
  if (!args.options.normalize) return;
  double sum = 0, counted = 0;
  for (int64_t b = 0; b < count; b++) sum += sums[2 * b], counted += sums[2 * b + 1];
  const S factor = S(inverse_mean(sum, counted));
  parallel_for(0, args.layout.tokens, kTokensPerTask, [&](int64_t b, int64_t e) { scale(args.weights, factor, b, e); });
}

template <class S, class Body> void run(const OffPolicyArgs<S>& args, Body body) {
  parallel_for(0, args.layout.sequences, sequences_per_task(args.layout), [&](int64_t b, int64_t e) { body(args, b, e); });
}

}  // namespace

void cpu_importance_weights(const WeightArgs<float>& args) {
  run(args, importance_cpu().weights_f32, importance_cpu().scale_f32);
}
void cpu_importance_weights(const WeightArgs<double>& args) {
  run(args, importance_cpu().weights_f64, importance_cpu().scale_f64);
}
void cpu_off_policy_mask(const OffPolicyArgs<float>& args) { run(args, importance_cpu().keep_f32); }
void cpu_off_policy_mask(const OffPolicyArgs<double>& args) { run(args, importance_cpu().keep_f64); }

}  // namespace prefkern
