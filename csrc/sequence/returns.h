// Discounted returns and advantage estimates, from the last token of a sequence to the first, for the CPU and for CUDA.
// Tokens that do not count are passed over as if they were not there, and get 0.
//
// S is the element type: float, or double on the CPU. What is carried along is double either way.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/returns.h"

namespace prefkern {

// Without values: returns, in `advantages`. With values: advantages, and in `returns` the sum of both.
template <class S> struct ReturnsArgs {
  ReturnsRule rule;
  SequenceLayout layout;
  const S *rewards = nullptr, *values = nullptr;
  const uint8_t* mask = nullptr;      // one per token, 0 = does not count; null = all count
  const int64_t* lengths = nullptr;   // [sequences], how many tokens of a padded sequence count; null = all
  const uint8_t* finished = nullptr;  // [sequences]; null = all are
  const S* last_values = nullptr;     // [sequences] with Bootstrap::critic
  S *advantages = nullptr, *returns = nullptr;
};

// Returns over the rows of segments, which lie anywhere.
template <class S> struct SegmentedArgs {
  double gamma = 1;
  int64_t count = 0;
  const S* rewards = nullptr;
  const int64_t* segment = nullptr;  // id of each row; on CUDA sorted, and so is `place`
  const int64_t* place = nullptr;    // ascends within a segment in the order of time
  const int64_t* rows = nullptr;     // CUDA: the row of each sorted position
  S* returns = nullptr;
};

PK_API void cpu_returns(const ReturnsArgs<float>& args);
PK_API void cpu_returns(const ReturnsArgs<double>& args);
// A row whose place another row of the segment has too, or -1.
PK_API int64_t cpu_segmented_returns(const SegmentedArgs<float>& args);
PK_API int64_t cpu_segmented_returns(const SegmentedArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes everything NaN; a length that is, its sequence; a
// place that occurs twice, its segment.
PK_API int cuda_returns(const ReturnsArgs<float>& args, void* stream);
PK_API int cuda_segmented_returns(const SegmentedArgs<float>& args, void* stream);

}  // namespace prefkern
