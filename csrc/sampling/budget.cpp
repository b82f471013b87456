#include "sampling/budget.h"

#include <algorithm>
#include <queue>
#include <utility>
#include <vector>

#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kBlock = 256;  // sums that are made together, in cache

// best[s] for the first prompts and a surplus of at most s; of the next prompt's choices the first of the best is noted.
void add_prompt(const double* utilities, int64_t choices, const double* before, double* best, int32_t* chosen, int64_t begin,
                int64_t end) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = std::min(kBlock, end - first);
    double sums[kBlock], which[kBlock];
    for (int64_t i = 0; i < n; i++) sums[i] = before[first + i] + utilities[0], which[i] = 0;
    for (int64_t j = 1; j < choices && j < first + n; j++) {
      const double worth = utilities[j], number = double(j);
      for (int64_t i = std::max<int64_t>(0, j - first); i < n; i++) {
        const double sum = before[first + i - j] + worth;
        const bool more = sum > sums[i];
        sums[i] = more ? sum : sums[i];
        which[i] = more ? number : which[i];
      }
    }
    for (int64_t i = 0; i < n; i++) best[first + i] = sums[i], chosen[first + i] = int32_t(which[i]);
  }
}

void exact(const BudgetArgs& a, int64_t surplus) {
  const int64_t sums = surplus + 1;
  std::vector<double> before(static_cast<size_t>(sums)), best(static_cast<size_t>(sums));
  std::vector<int32_t> chosen(static_cast<size_t>(sums * a.prompts));
  for (int64_t p = 0; p < a.prompts; p++) {
    parallel_for(0, sums, 4 * kBlock, [&](int64_t begin, int64_t end) {
      add_prompt(a.utilities + p * a.choices, a.choices, before.data(), best.data(), chosen.data() + p * sums, begin, end);
    });
    std::swap(before, best);
  }
  for (int64_t p = a.prompts - 1; p >= 0; p--) {
    a.extra[p] = chosen[static_cast<size_t>(p * sums + surplus)];
    surplus -= a.extra[p];
  }
}

void greedy(const BudgetArgs& a, int64_t surplus) {
  struct Gain {
    double more;
    int64_t prompt;
    bool operator<(const Gain& other) const { return more < other.more || (more == other.more && prompt > other.prompt); }
  };
  std::priority_queue<Gain> gains;  // at most one per prompt
  const auto offer = [&](int64_t p) {
    const double* u = a.utilities + p * a.choices + a.extra[p];
    if (a.extra[p] + 1 < a.choices && u[1] > u[0]) gains.push({u[1] - u[0], p});
  };
  std::fill(a.extra, a.extra + a.prompts, 0);
  for (int64_t p = 0; p < a.prompts; p++) offer(p);
  for (; surplus > 0 && !gains.empty(); surplus--) {
    const int64_t p = gains.top().prompt;
    gains.pop();
    a.extra[p]++;
    offer(p);
  }
}

}  // namespace

void cpu_allocate_budget(const BudgetArgs& a) {
  const int64_t surplus = std::min(a.surplus, a.prompts * (a.choices - 1));
  a.method == BudgetMethod::exact ? exact(a, surplus) : greedy(a, surplus);
}

}  // namespace prefkern
