// Difficulty weights of questions: groups of samples whose rewards differ (max - min > tol) get V exp(D / temperature) / sum
// exp(D / temperature), D = -mean of the main rewards, V their number; the others 1. And the scale: tokens of all samples
// over those of samples of valid questions.
//
// S is the element type: float, or double on the CPU. Sums are in double either way.
#pragma once
#include "core/common.h"
#include "math/advantages.h"

namespace prefkern {

template <class S> struct QuestionArgs {
  int64_t count = 0;                  // B
  double temperature = 2, tol = 1e-8;
  bool zero_as_easy = true;
  const S *rewards = nullptr, *main = nullptr;  // [B]; main may be rewards
  const int64_t* group = nullptr;     // ids; on CUDA with `order`: sorted
  const int64_t* order = nullptr;     // CUDA: row of each sorted id (a stable sort); null: ids are in the order of the rows
  const int64_t* lengths = nullptr;   // [B]; null: scale is 1
  double* difficulty = nullptr;       // CUDA: [B], scratch: D / temperature
  uint8_t* first = nullptr;           // CUDA: [B], scratch: whether the row is the first of its group
  S *weights = nullptr, *scale = nullptr;  // [B], [1]
  uint8_t* valid = nullptr;                // [B], bool
};

// False if the valid questions have no tokens.
PK_API bool cpu_question_weights(const QuestionArgs<float>& args);
PK_API bool cpu_question_weights(const QuestionArgs<double>& args);

// Enqueue on `stream`; returns a cudaError_t. A reward that is not finite makes everything NaN.
PK_API int cuda_question_weights(const QuestionArgs<float>& args, void* stream);

}  // namespace prefkern
