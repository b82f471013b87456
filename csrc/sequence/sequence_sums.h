// Weighted sums or means over the tokens of each sequence, sum_t w f(x - y), for the CPU and for CUDA, and their gradient
// in x. Tokens outside the mask or outside the span of their sequence add nothing, whatever they hold, and get the
// gradient 0. Those that count may also weigh by their place among them: see PlaceRule.
//
// A sequence is always added up in the same order, so results do not depend on threads. S is the element type: float, or
// double on the CPU.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/sequence.h"

namespace prefkern {

template <class S> struct SequenceSumArgs {
  TokenTransform transform = TokenTransform::none;
  bool mean = false;
  PlaceRule place;
  SequenceLayout layout;
  const S *values = nullptr, *minus = nullptr, *weights = nullptr;  // x, y (null: 0) and w (null: 1), one per token
  const uint8_t* mask = nullptr;                                    // 0 = does not count; null = all count
  // [sequences] each, positions in the sequence: the first token of the span (null: 0) and the one behind it (null: the end)
  const int64_t *starts = nullptr, *ends = nullptr;
  const int64_t* head = nullptr;  // [sequences], how many tokens that count do not belong to the tail; null = all
  S* sums = nullptr;                                                // forward: [sequences]
  const S* upstream = nullptr;                                      // backward: [sequences], and the result, [tokens]
  S* grad = nullptr;
};

inline namespace PK_ISA {

// The tokens of a sequence that may count. On CUDA nobody has looked at starts, ends and head before the launch.
struct TokenSpan {
  int64_t begin, end, head;
  bool valid;
};
template <class S> PK_HD TokenSpan token_span(const SequenceSumArgs<S>& a, int64_t b) {
  const int64_t begin = sequence_begin(a.layout, b), size = sequence_end(a.layout, b) - begin;
  const int64_t from = a.starts ? a.starts[b] : 0, to = a.ends ? a.ends[b] : size, head = a.head ? a.head[b] : INT64_MAX;
  return {begin + from, begin + to, head, 0 <= from && from <= to && to <= size && head >= 0};
}
template <class S> PK_HD bool places_matter(const SequenceSumArgs<S>& a) { return a.head || a.place.decay != 1; }

}  // namespace PK_ISA

PK_API void cpu_sequence_sums(const SequenceSumArgs<float>& args);
PK_API void cpu_sequence_sums(const SequenceSumArgs<double>& args);
PK_API void cpu_sequence_sums_backward(const SequenceSumArgs<float>& args);
PK_API void cpu_sequence_sums_backward(const SequenceSumArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes everything NaN; a span or a head that is, its
// sequence.
PK_API int cuda_sequence_sums(const SequenceSumArgs<float>& args, void* stream);
PK_API int cuda_sequence_sums_backward(const SequenceSumArgs<float>& args, void* stream);

}  // namespace prefkern
