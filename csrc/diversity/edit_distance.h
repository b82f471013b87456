// The edit distance between the responses to each prompt, on the CPU: the fewest insertions, deletions and substitutions of a
// token, averaged over the pairs of responses.
#pragma once
#include "diversity/prompts.h"

namespace prefkern {

template <class T> struct EditArgs {
  PromptArgs<T> of;
  bool normalize = false;  // each pair's over the length of its longer response; 0 for two empty ones
};

// NaN for a prompt with fewer than two responses. A pair of m and n tokens takes O(m n / 64) time, O(m + n) memory.
PK_API void cpu_edit_distance(const EditArgs<int32_t>& args);
PK_API void cpu_edit_distance(const EditArgs<int64_t>& args);

}  // namespace prefkern
