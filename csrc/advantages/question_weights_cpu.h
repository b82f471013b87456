// Functions that question_weights_cpu.cpp exports once per instruction set.
#pragma once
#include "advantages/question_weights.h"

namespace prefkern {
struct QuestionWeightsCpu {
  // Over the groups of a GroupIndex; `difficulty` has room for one number of each. False: no tokens.
  bool (*f32)(const QuestionArgs<float>&, const int64_t* order, const int64_t* offsets, int64_t groups, double* difficulty);
  bool (*f64)(const QuestionArgs<double>&, const int64_t* order, const int64_t* offsets, int64_t groups, double* difficulty);
};
}  // namespace prefkern
