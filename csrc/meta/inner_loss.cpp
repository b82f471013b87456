// CPU entry points of inner_loss.h: pick the instruction set, share the blocks out over torch's threads, add up their sums.
#include "meta/inner_loss.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "meta/inner_loss_cpu.h"

namespace prefkern {

PK_ISA_TABLE(InnerLossCpu, inner_loss_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

struct Sums {
  double policy = 0, divergence = 0;
};

template <class S> void each_block(const LpgArgs<S>& a, void (*body)(const LpgArgs<S>&, int64_t, int64_t)) {
  const int64_t of_block = kLpgBlock * (a.width + 4), grain = std::max<int64_t>(1, kElementsPerTask / of_block);
  parallel_for(0, ceil_div(a.rows, kLpgBlock), grain, [&](int64_t begin, int64_t end) { body(a, begin, end); });
}

template <class S> Sums sums_of(const LpgArgs<S>& a) {
  Sums total;
  for (int64_t block = 0; block < ceil_div(a.rows, kLpgBlock); block++) {
    total.policy += a.sums[block * kLpgSums + kLpgPolicy];
    total.divergence += a.sums[block * kLpgSums + kLpgDivergence];
  }
  return total;
}

template <class S> void finish_loss(const LpgArgs<S>& a) {
  const Sums total = sums_of(a);
  const double rows = double(a.rows);
  *a.out = S((a.rule.sign * total.policy + a.rule.alpha * total.divergence) / rows);
  a.terms[0] = S(total.policy / rows);
  a.terms[1] = S(total.divergence / rows);
}

template <class S> void finish_second(const LpgArgs<S>& a) {
  const Sums total = sums_of(a);
  *a.out = S((a.rule.sign * total.policy + a.rule.alpha * total.divergence) / double(a.rows));
}

}  // namespace

void cpu_lpg_loss(const LpgArgs<float>& a) {
  each_block(a, inner_loss_cpu().loss_f32);
  finish_loss(a);
}
void cpu_lpg_loss(const LpgArgs<double>& a) {
  each_block(a, inner_loss_cpu().loss_f64);
  finish_loss(a);
}
void cpu_lpg_gradients(const LpgArgs<float>& a) { each_block(a, inner_loss_cpu().gradients_f32); }
void cpu_lpg_gradients(const LpgArgs<double>& a) { each_block(a, inner_loss_cpu().gradients_f64); }
void cpu_lpg_second(const LpgArgs<float>& a) {
  each_block(a, inner_loss_cpu().second_f32);
  finish_second(a);
}
void cpu_lpg_second(const LpgArgs<double>& a) {
  each_block(a, inner_loss_cpu().second_f64);
  finish_second(a);
}

}  // namespace prefkern
