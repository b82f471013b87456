// The CPU walk of beta_thompson.h, a prompt per lane. A proposal is repeated while one lane of the vector still needs it; lanes
// that have theirs keep it, so that a prompt's draw does not depend on its neighbours.
#include "sampling/beta_thompson_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

PK_HD VecU prompts_from(uint32_t first, VecF) {
  VecU p;
  for (int i = 0; i < kLanes; i++) p[i] = first + uint32_t(i);
  return p;
}
PK_HD uint32_t prompts_from(uint32_t first, double) { return first; }

template <class S> PK_HD bool good_count(S x) { return x >= 0 && x <= S(kMostEvidence); }

// n prompts from `first` on: as many as there are lanes, or fewer. Returns the first eligible one with a wrong count, or -1.
template <class V, class S> PK_HD int64_t few(const ThompsonArgs<S>& a, S* utilities, int64_t first, int64_t n) {
  constexpr int64_t L = Lanes<V>::count;
  constexpr S never = S(-__builtin_inf());
  bool wanted = !a.eligible || a.draws;
  if (a.eligible)
    for (int64_t i = 0; i < n; i++) wanted |= a.eligible[first + i] != 0;
  if (!wanted) {
    for (int64_t i = 0; i < n; i++) utilities[i] = never;
    return -1;
  }
  S alpha_lanes[L] = {}, beta_lanes[L] = {}, lanes[L];
  for (int64_t i = 0; i < n; i++) alpha_lanes[i] = a.alpha[first + i], beta_lanes[i] = a.beta[first + i];
  const V alpha = Mem<V>::load(alpha_lanes), beta = Mem<V>::load(beta_lanes);
  V utility, draw;
  if (a.mode == ThompsonMode::mean) {
    const V x = alpha + 1, y = beta + 1;
    draw = x / (x + y);
    utility = expected_thompson_utility(a.utility, x, y);
  } else {
    draw = beta_draw(alpha, beta, a.seed, a.step, prompts_from(uint32_t(first), V()));
    utility = thompson_utility(a.utility, draw);
  }
  Mem<V>::store(lanes, utility);
  for (int64_t i = 0; i < n; i++) utilities[i] = lanes[i];
  if (a.draws) {
    Mem<V>::store(lanes, draw);
    for (int64_t i = 0; i < n; i++) a.draws[first + i] = lanes[i];
  }
  if (a.eligible)
    for (int64_t i = 0; i < n; i++) utilities[i] = a.eligible[first + i] ? utilities[i] : never;
  constexpr S most = S(kMostEvidence);
  const LanesIf<V> wrong = ((alpha >= 0) & (alpha <= most) & (beta >= 0) & (beta <= most)) == 0;
  if (any_lane(wrong))
    for (int64_t i = 0; i < n; i++)
      if (!(good_count(alpha_lanes[i]) && good_count(beta_lanes[i])) && (!a.eligible || a.eligible[first + i]))
        return first + i;
  return -1;
}

template <class V, class S> int64_t walk(const ThompsonArgs<S>& a, S* utilities, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<V>::count;
  int64_t wrong = -1, first = begin;
  for (; first + L <= end; first += L) {
    const int64_t here = few<V, S>(a, utilities + (first - begin), first, L);
    if (wrong < 0) wrong = here;
  }
  if (first < end) {
    const int64_t here = few<V, S>(a, utilities + (first - begin), first, end - first);
    if (wrong < 0) wrong = here;
  }
  return wrong;
}

}  // namespace

extern const BetaThompsonCpu beta_thompson_cpu;
const BetaThompsonCpu beta_thompson_cpu = {&walk<VecF, float>, &walk<double, double>};

}  // namespace PK_ISA
}  // namespace prefkern
