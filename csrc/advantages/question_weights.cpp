// CPU entry points: the groups as lists of rows, and the instruction set.
#include "advantages/question_weights.h"

#include <vector>

#include "advantages/question_weights_cpu.h"
#include "core/groups.h"
#include "core/isa.h"

namespace prefkern {

PK_ISA_TABLE(QuestionWeightsCpu, question_weights_cpu)

namespace {

template <class S, class Walk> bool run(const QuestionArgs<S>& args, Walk walk) {
  const GroupIndex index = group_index(args.group, args.count);
  const int64_t groups = args.count > 0 ? index.groups() : 0;
  std::vector<double> difficulty(groups);
  return walk(args, index.order.data(), index.offsets.data(), groups, difficulty.data());
}

}  // namespace

bool cpu_question_weights(const QuestionArgs<float>& args) { return run(args, question_weights_cpu().f32); }
bool cpu_question_weights(const QuestionArgs<double>& args) { return run(args, question_weights_cpu().f64); }

}  // namespace prefkern
