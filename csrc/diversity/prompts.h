// Responses of prompts, as the kernels of this room get and read them: a prompt's tokens that count, one response behind the
// other, as numbers that are equal where the tokens are. T is the type of the tokens: int64_t or int32_t.
#pragma once
#include "core/common.h"
#include "core/sequence.h"

namespace prefkern {

template <class T> struct PromptArgs {
  SequenceLayout layout;
  int64_t prompts = 0;
  const int32_t* cu_prompts = nullptr;  // [prompts + 1], where the responses of each begin; null: all are of one prompt
  const T* ids = nullptr;
  const uint8_t* mask = nullptr;        // per token, 0 = does not count; null = all count
  double* result = nullptr;             // [prompts]
};

}  // namespace prefkern
