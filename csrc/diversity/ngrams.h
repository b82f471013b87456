// Self-BLEU and distinct-n of the responses to each prompt, on the CPU.
//
// Self-BLEU is the mean over the responses of the BLEU of one against all others: per order n, m_n n-grams of it are matched,
// each as often as it comes in that other response in which it comes most; with l_n n-grams, p_n = m_n / max(1, l_n), where
// m_n = 0 is taken as `smoothing`; BLEU = b exp(sum_n w_n log p_n), 0 without a single token matched. b is 1 for a response
// longer than the reference length r, else exp(1 - r / length); r is that of the response nearest in length, of two the shorter.
#pragma once
#include "diversity/prompts.h"

namespace prefkern {

template <class T> struct SelfBleuArgs {
  PromptArgs<T> of;
  int64_t orders = 0;
  const double* weights = nullptr;  // [orders]
  double smoothing = 0.1;
};

// NaN for a prompt with fewer than two responses. O(tokens * orders) per prompt.
PK_API void cpu_self_bleu(const SelfBleuArgs<int32_t>& args);
PK_API void cpu_self_bleu(const SelfBleuArgs<int64_t>& args);

template <class T> struct DistinctArgs {
  PromptArgs<T> of;
  int64_t n = 3;
};

// Distinct n-grams of a prompt over all it has; 0 if it has none.
PK_API void cpu_distinct_n(const DistinctArgs<int32_t>& args);
PK_API void cpu_distinct_n(const DistinctArgs<int64_t>& args);

}  // namespace prefkern
