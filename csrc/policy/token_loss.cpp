// CPU entry points: pick the instruction set, share the sequences out over torch's threads, join their sums in order.
#include "policy/token_loss.h"

#include <algorithm>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "policy/token_loss_cpu.h"

namespace prefkern {

PK_ISA_TABLE(TokenLossCpu, token_loss_cpu)

namespace {

constexpr int64_t kTokensPerTask = 1 << 14, kCopiesPerTask = 1 << 16;

template <class S> void run(const PolicyArgs<S>& args, void (*sequences)(const PolicyArgs<S>&, double*, int64_t, int64_t)) {
  const int64_t count = args.layout.sequences;
  std::vector<double> sums(count * kPolicySums);
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * count / std::max<int64_t>(1, args.layout.tokens));
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { sequences(args, sums.data(), begin, end); });
  double total[kPolicySums] = {};
  total[kMinRatio] = __builtin_inf();
  for (int64_t b = 0; b < count; b++) {
    const double* s = &sums[b * kPolicySums];
    for (int k = 0; k < kMinRatio; k++) total[k] += s[k];
    total[kMinRatio] = std::min(total[kMinRatio], s[kMinRatio]);
    total[kMaxRatio] = std::max(total[kMaxRatio], s[kMaxRatio]);
  }
  policy_finish(total, norm_of(args, total), args.loss, args.metrics, args.inverse_norm);
}

template <class S> void run_backward(const PolicyGradArgs<S>& args, void (*body)(const PolicyGradArgs<S>&, int64_t, int64_t)) {
  parallel_for(0, args.tokens, kCopiesPerTask, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_policy_loss(const PolicyArgs<float>& args) { run(args, token_loss_cpu().sequences_f32); }
void cpu_policy_loss(const PolicyArgs<double>& args) { run(args, token_loss_cpu().sequences_f64); }
void cpu_policy_loss_backward(const PolicyGradArgs<float>& args) { run_backward(args, token_loss_cpu().backward_f32); }
void cpu_policy_loss_backward(const PolicyGradArgs<double>& args) { run_backward(args, token_loss_cpu().backward_f64); }

}  // namespace prefkern
