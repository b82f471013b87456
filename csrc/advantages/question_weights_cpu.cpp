// The CPU walk of question_weights.h: every group once for its difficulty, once for its weight.
#include "advantages/question_weights_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class S>
bool weigh(const QuestionArgs<S>& a, const int64_t* order, const int64_t* offsets, int64_t groups, double* difficulty) {
  double largest = -kInfinity, tokens = 0, valid_tokens = 0, questions = 0;
  for (int64_t g = 0; g < groups; g++) {
    double low = kInfinity, high = -kInfinity, sum = 0, length = 0;
    for (int64_t i = offsets[g]; i < offsets[g + 1]; i++) {
      const int64_t row = order[i];
      const double r = double(a.rewards[row]);
      low = r < low ? r : low;
      high = r > high ? r : high;
      sum += double(a.main[row]);
      if (a.lengths) length += double(a.lengths[row]);
    }
    const bool valid = high - low > a.tol;
    for (int64_t i = offsets[g]; i < offsets[g + 1]; i++) a.valid[order[i]] = valid;
    tokens += length;
    if (!valid) continue;
    valid_tokens += length;
    questions += 1;
    difficulty[g] = question_difficulty(sum / double(offsets[g + 1] - offsets[g]), a.temperature, a.tol, a.zero_as_easy);
    largest = difficulty[g] > largest ? difficulty[g] : largest;
  }
  double all = 0;
  for (int64_t g = 0; g < groups; g++)
    if (a.valid[order[offsets[g]]]) all += vexp(difficulty[g] - largest);
  for (int64_t g = 0; g < groups; g++) {
    const bool valid = a.valid[order[offsets[g]]];
    const S weight = S(valid ? questions * vexp(difficulty[g] - largest) / all : 1.0);
    for (int64_t i = offsets[g]; i < offsets[g + 1]; i++) a.weights[order[i]] = weight;
  }
  const bool scaled = a.lengths && questions > 0;
  *a.scale = S(scaled ? tokens / valid_tokens : 1.0);
  return !scaled || valid_tokens > 0;
}

}  // namespace

extern const QuestionWeightsCpu question_weights_cpu;
const QuestionWeightsCpu question_weights_cpu = {&weigh<float>, &weigh<double>};

}  // namespace PK_ISA
}  // namespace prefkern
