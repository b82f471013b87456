// A budget shared out: n prompts, each with a table of what 0, 1, ... more rollouts than the least are worth to it; the sum of
// what is chosen is as large as the surplus allows (a multiple-choice knapsack of unit costs). On the CPU, in double.
#pragma once
#include "core/common.h"

namespace prefkern {

enum class BudgetMethod : int32_t { exact = 0, greedy = 1 };

struct BudgetArgs {
  BudgetMethod method = BudgetMethod::exact;
  int64_t prompts = 0, choices = 0;    // n, K
  int64_t surplus = 0;                 // may be given in all; more than n (K - 1) is as good as that
  const double* utilities = nullptr;   // [n, K], finite: of prompt i with j more
  int64_t* extra = nullptr;            // [n] out: j of each prompt
};

// exact: a dynamic programme over the surplus, O(n surplus K) time and O(n surplus) memory; of equal sums the one that gives less
// to the later prompt, and of these the one that spends less.
// greedy: one rollout at a time to the prompt that gains most by it, the first of equal ones, until nobody gains; where
// utilities are not concave that may be far from the most.
PK_API void cpu_allocate_budget(const BudgetArgs& args);

}  // namespace prefkern
