// Policy loss over tokens in one pass, for the CPU and for CUDA: the loss, all metrics and, where asked for, each token's
// gradient before the division by the global count, which is only known at the end. The backward is then one elementwise
// pass. Tokens outside the mask are skipped before anything is computed from them.
//
// Sums are formed per sequence (CPU) or block (CUDA) and added in a fixed order, so results do not depend on threads.
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/policy.h"

namespace prefkern {

template <class S> struct PolicyArgs {
  PolicyOptions options;
  SequenceLayout layout;
  const S *logp = nullptr, *old_logp = nullptr;
  const S* ref_logp = nullptr;        // null if and only if options.kl is none
  const S* advantages = nullptr;      // one per token, or one per sequence
  bool token_advantages = false;
  const uint8_t* mask = nullptr;      // one per token, 0 = does not count; null = all count
  S* grad = nullptr;                  // [tokens] unnormalised; null when not wanted
  S *loss = nullptr, *metrics = nullptr, *inverse_norm = nullptr;  // [1], [kPolicyMetrics], [1]
  // CUDA: how many blocks share a sequence, [policy_blocks, kPolicySums] sums, and a counter that must be 0.
  int64_t slices = 1;
  float* partials = nullptr;
  uint32_t* finished = nullptr;
};

template <class S> struct PolicyGradArgs {
  int64_t tokens = 0;
  const S *unnormalised = nullptr, *upstream = nullptr, *inverse_norm = nullptr;  // [tokens], [1], [1]
  S* grad = nullptr;
};

// Few long sequences are shared out over several blocks. Depends on shapes alone, so that equal input gives equal bits on
// every device.
inline int64_t policy_slices(const SequenceLayout& l) {
  constexpr int64_t blocks_wanted = 256, tokens_per_block = 2048;
  if (l.sequences == 0) return 1;
  const int64_t wanted = ceil_div(blocks_wanted, l.sequences), useful = ceil_div(l.tokens, l.sequences * tokens_per_block);
  return useful < 1 ? 1 : wanted < useful ? wanted : useful;
}

PK_API void cpu_policy_loss(const PolicyArgs<float>& args);
PK_API void cpu_policy_loss(const PolicyArgs<double>& args);
PK_API void cpu_policy_loss_backward(const PolicyGradArgs<float>& args);
PK_API void cpu_policy_loss_backward(const PolicyGradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes loss, metrics and gradient NaN.
PK_API int cuda_policy_loss(const PolicyArgs<float>& args, void* stream);
PK_API int cuda_policy_loss_backward(const PolicyGradArgs<float>& args, void* stream);

}  // namespace prefkern
