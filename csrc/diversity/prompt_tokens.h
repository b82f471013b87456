// What the walks over prompts share: reading one, and sharing them out.
#pragma once
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "diversity/interner.h"
#include "diversity/prompts.h"

namespace prefkern {

// A prompt's tokens by number, and where each response begins. Memory is kept from one prompt to the next.
struct PromptTokens {
  std::vector<uint32_t> tokens;
  std::vector<int64_t> begins;  // responses + 1
  Interner interner;            // of the tokens

  int64_t responses() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t length(int64_t k) const { return begins[k + 1] - begins[k]; }

  template <class T> void read(const PromptArgs<T>& a, int64_t prompt) {
    const int64_t first = a.cu_prompts ? a.cu_prompts[prompt] : 0;
    const int64_t last = a.cu_prompts ? a.cu_prompts[prompt + 1] : a.layout.sequences;
    const int64_t begin = first < last ? sequence_begin(a.layout, first) : 0;
    const int64_t end = first < last ? sequence_end(a.layout, last - 1) : 0;
    interner.reset(end - begin);
    tokens.clear();
    tokens.reserve(end - begin);
    begins.assign(1, 0);
    for (int64_t b = first; b < last; b++) {
      for (int64_t t = sequence_begin(a.layout, b); t < sequence_end(a.layout, b); t++)
        if (!a.mask || a.mask[t]) tokens.push_back(interner(static_cast<uint64_t>(static_cast<int64_t>(a.ids[t]))));
      begins.push_back(static_cast<int64_t>(tokens.size()));
    }
  }
};

// body(begin, end): a range of prompts. Each prompt's result depends on it alone, so that threads change nothing.
template <class T, class Body> void for_prompts(const PromptArgs<T>& a, int64_t tokens_per_task, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, tokens_per_task * a.prompts / std::max<int64_t>(1, a.layout.tokens));
  parallel_for(0, a.prompts, grain, body);
}

}  // namespace prefkern
