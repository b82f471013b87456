// Policy loss over tokens in one pass, for the CPU and for CUDA: the loss, all metrics and, where asked for, each token's
// gradient before the division by the global count, which is only known at the end. The backward is then one elementwise
// pass. Tokens outside the mask are skipped before anything is computed from them. A ratio of the sequence needs a pass of
// its own first: over the sequence on the CPU, where it is still in the cache for the second, a launch on CUDA.
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
  const S *logp = nullptr, *old_logp = nullptr;  // may be the same
  const S* ref_logp = nullptr;        // null if and only if options.kl is none
  // Each one per token, or one per sequence. Null: -1 (reinforce then adds up logp), the bounds of options, and 1.
  const S *advantages = nullptr, *eps_low = nullptr, *eps_high = nullptr, *weights = nullptr;
  bool token_advantages = false, token_eps_low = false, token_eps_high = false, token_weights = false;
  const S* entropy = nullptr;         // one per token, for the metric
  const uint8_t* anchor = nullptr;    // one per sequence; null = none is one
  const uint8_t* mask = nullptr;      // one per token, 0 = does not count; null = all count
  const S* norm = nullptr;            // [1], in place of options.norm
  S* grad = nullptr;                  // [tokens] unnormalised; null when not wanted
  S *loss = nullptr, *metrics = nullptr, *inverse_norm = nullptr;  // [1], [kPolicyMetrics], [1]
  // CUDA: how many blocks share a sequence, [sequences * slices, kPolicySums] sums, the same by kPolicyRowSums where a
  // kind has a ratio of the sequence, and a counter that must be 0.
  int64_t slices = 1;
  float *partials = nullptr, *row_partials = nullptr;
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

// The commonest calls have kernels of their own: clip with one advantage per sequence, no penalty or k3.
template <class S> bool is_plain(const PolicyArgs<S>& a) {
  const PolicyOptions& o = a.options;
  const bool plain_kl = o.kl == KlKind::none || (o.kl == KlKind::k3 && o.kl_clamp > 1.7976931348623157e308 && !o.kl_ratio);
  return o.kind == PolicyKind::clip && plain_kl && a.advantages && !a.token_advantages && !a.token_eps_low &&
         !a.token_eps_high && !a.weights && !a.entropy && !a.anchor;
}

PK_API void cpu_policy_loss(const PolicyArgs<float>& args);
PK_API void cpu_policy_loss(const PolicyArgs<double>& args);
PK_API void cpu_policy_loss_backward(const PolicyGradArgs<float>& args);
PK_API void cpu_policy_loss_backward(const PolicyGradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes loss, metrics and gradient NaN, bounds that are
// no bounds the loss and the gradient of their tokens.
PK_API int cuda_policy_loss(const PolicyArgs<float>& args, void* stream);
PK_API int cuda_policy_loss_backward(const PolicyGradArgs<float>& args, void* stream);

// The options of sequence b: those of the call, with its own bounds and, for an anchor, its own kind.
inline namespace PK_ISA {
template <class S> PK_HD PolicyOptions sequence_options(const PolicyArgs<S>& a, int64_t b) {
  PolicyOptions o = a.options;
  if (a.eps_low && !a.token_eps_low) o.eps_low = double(a.eps_low[b]);
  if (a.eps_high && !a.token_eps_high) o.eps_high = double(a.eps_high[b]);
  if (a.anchor && a.anchor[b]) o.kind = o.anchor_nll ? PolicyKind::anchor_nll : PolicyKind::anchor_shaped;
  return o;
}
template <class S> PK_HD double norm_of(const PolicyArgs<S>& a, const double* sums) {
  const bool given = a.norm || a.options.norm >= 0;
  return policy_norm(sums, a.options, a.layout.sequences, given, a.norm ? double(*a.norm) : a.options.norm);
}
}  // namespace PK_ISA

}  // namespace prefkern
