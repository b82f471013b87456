// CPU entry points: pick the instruction set, share the pairs out over torch's threads, join their sums in order.
#include "preference/pair_loss.h"

#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "preference/pair_loss_cpu.h"

namespace prefkern {

PK_ISA_TABLE(PairLossCpu, pair_loss_cpu)

namespace {

constexpr int64_t kPairsPerTask = 1 << 11;  // also what sums are formed over, whatever the threads

template <class S> void run(const PreferenceArgs<S>& args, void (*pairs)(const PreferenceArgs<S>&, double*, int64_t, int64_t)) {
  const int64_t tasks = ceil_div(args.pairs, kPairsPerTask);
  std::vector<double> sums(tasks * kPreferenceSums);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t last = (t + 1) * kPairsPerTask;
      pairs(args, &sums[t * kPreferenceSums], t * kPairsPerTask, last < args.pairs ? last : args.pairs);
    }
  });
  double total[kPreferenceSums] = {};
  for (int64_t t = 0; t < tasks; t++)
    for (int k = 0; k < kPreferenceSums; k++) total[k] += sums[t * kPreferenceSums + k];
  const double norm = args.losses ? 1.0 : norm_of(args, total);
  preference_finish(total, args.desirable != nullptr, norm, args.loss, args.metrics, args.inverse_norm);
}

template <class S> void run_backward(const PreferenceGradArgs<S>& args,
                                     void (*body)(const PreferenceGradArgs<S>&, int64_t, int64_t)) {
  parallel_for(0, args.pairs, 1 << 15, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_preference_loss(const PreferenceArgs<float>& args) { run(args, pair_loss_cpu().pairs_f32); }
void cpu_preference_loss(const PreferenceArgs<double>& args) { run(args, pair_loss_cpu().pairs_f64); }
void cpu_preference_loss_backward(const PreferenceGradArgs<float>& args) { run_backward(args, pair_loss_cpu().backward_f32); }
void cpu_preference_loss_backward(const PreferenceGradArgs<double>& args) { run_backward(args, pair_loss_cpu().backward_f64); }

}  // namespace prefkern
