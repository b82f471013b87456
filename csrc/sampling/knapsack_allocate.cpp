// knapsack_allocate: a budget shared out among prompts.
#include <cmath>

#include "core/tensor.h"
#include "sampling/budget.h"
#include "sampling/ops.h"

namespace prefkern {

Tensor knapsack_allocate(const Tensor& utilities, int64_t surplus, int64_t method) {
  check_value(utilities.is_cpu(), "utilities is on ", device_text(utilities), "; budgets are allocated on the CPU");
  float_dtype(utilities, "utilities");
  check_value(utilities.dim() == 2 && utilities.size(1) > 0, "utilities has shape ", shape_text(utilities),
              "; expected [n, K] with K > 0");
  check_value(utilities.size(1) <= int64_t(1) << 31, "utilities has shape ", shape_text(utilities), "; K is at most 2^31");
  check_value(surplus >= 0, "surplus is ", surplus, "; it must not be negative");
  check_value(method >= 0 && method <= 1, "method is ", method, "; accepted: 0, 1");
  const Tensor table = to_contiguous(cast(utilities, ScalarType::Double));
  BudgetArgs a;
  a.method = static_cast<BudgetMethod>(method);
  a.prompts = table.size(0);
  a.choices = table.size(1);
  a.surplus = surplus;
  a.utilities = data<double>(table);
  for (int64_t i = 0; i < table.numel(); i++)
    check_value(std::isfinite(a.utilities[i]), "utilities[", i / a.choices, ", ", i % a.choices, "] is ", a.utilities[i],
                "; a finite number is expected");
  const Tensor extra = empty({a.prompts}, ScalarType::Long, table);
  a.extra = mutable_data<int64_t>(extra);
  cpu_allocate_budget(a);
  return extra;
}

}  // namespace prefkern
