// The CPU walk of inner_loss.h, a block of rows at a time. The divergence is a sum over all elements of the block, whichever row
// they belong to, so its vectors run along them; those of the policy's part hold a row per lane, whose probabilities are gathered.
#include "meta/inner_loss_cpu.h"

#include "meta/partial_vectors.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kRun = 64;  // so many vectors are added up in S before they go into a sum in double

// Sums of vectors, kRun at a time.
template <class V> class Sum {
 public:
  PK_HD void add(V v) {
    run_ += v;
    if (++count_ == kRun) flush();
  }
  PK_HD double result() {
    flush();
    return total_;
  }

 private:
  PK_HD void flush() {
    total_ += lane_sum(run_);
    run_ = V{};
    count_ = 0;
  }
  V run_ = {};
  int64_t count_ = 0;
  double total_ = 0;
};

struct Block {
  int64_t begin, rows;
};
template <class S> PK_HD Block block_of(const LpgArgs<S>& a, int64_t index) {
  const int64_t begin = index * kLpgBlock, rows = a.rows - begin;
  return {begin, rows < kLpgBlock ? rows : kLpgBlock};
}

// One element per row out of [N, A], that of the action; lanes behind the last row hold `rest`.
template <class V, class S> PK_HD V gathered(const LpgArgs<S>& a, const S* from, int64_t row, int64_t count, S rest) {
  constexpr int64_t L = Lanes<V>::count;
  S some[L];
  for (int64_t lane = 0; lane < L; lane++)
    some[lane] = lane < count ? from[(row + lane) * a.actions + a.taken[row + lane]] : rest;
  return Mem<V>::load(some);
}
template <class V, class S> PK_HD void scattered(const LpgArgs<S>& a, S* to, int64_t row, int64_t count, V v) {
  constexpr int64_t L = Lanes<V>::count;
  S some[L];
  Mem<V>::store(some, v);
  for (int64_t lane = 0; lane < L && lane < count; lane++) to[(row + lane) * a.actions + a.taken[row + lane]] = some[lane];
}

template <class S> PK_HD void clear(S* p, int64_t count) {
  if (p) __builtin_memset(p, 0, sizeof(S) * count);
}

template <class V> void loss(const LpgArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t index = begin; index < end; index++) {
    const Block b = block_of(a, index);
    Sum<V> policy, divergence;
    for (int64_t i = 0; i < b.rows; i += L) {
      const int64_t row = b.begin + i, left = b.rows - i;
      policy.add(lpg_policy(gathered<V>(a, a.probs, row, left, S(1)), load_some<V>(a.adjustment + row, left, S(0))));
    }
    const S *y = a.y + b.begin * a.width, *target = a.target + b.begin * a.width;
    const int64_t elements = b.rows * a.width;
    for (int64_t i = 0; i < elements; i += L)
      divergence.add(lpg_divergence(load_some<V>(y + i, elements - i, S(0)), load_some<V>(target + i, elements - i, S(0))));
    a.sums[index * kLpgSums + kLpgPolicy] = policy.result();
    a.sums[index * kLpgSums + kLpgDivergence] = divergence.result();
  }
}

template <class V> void gradients(const LpgArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const double c = double(*a.upstream) / double(a.rows);
  const V of_policy = splat<V>(S(c * a.rule.sign)), of_divergence = splat<V>(S(c * a.rule.alpha));
  for (int64_t index = begin; index < end; index++) {
    const Block b = block_of(a, index);
    if (a.probs_grad) clear(a.probs_grad + b.begin * a.actions, b.rows * a.actions);
    if (a.probs_grad || a.adjustment_grad)
      for (int64_t i = 0; i < b.rows; i += L) {
        const int64_t row = b.begin + i, left = b.rows - i;
        const auto slopes =
            lpg_policy_slopes(gathered<V>(a, a.probs, row, left, S(1)), load_some<V>(a.adjustment + row, left, S(0)));
        if (a.probs_grad) scattered<V>(a, a.probs_grad, row, left, of_policy * slopes.first);
        if (a.adjustment_grad) store_some<V>(a.adjustment_grad + row, left, of_policy * slopes.second);
      }
    if (!a.y_grad && !a.target_grad) continue;
    const int64_t first = b.begin * a.width, last = first + b.rows * a.width;
    for (int64_t i = first; i < last; i += L) {
      const auto slopes =
          lpg_divergence_slopes(load_some<V>(a.y + i, last - i, S(0)), load_some<V>(a.target + i, last - i, S(0)));
      if (a.y_grad) store_some<V>(a.y_grad + i, last - i, of_divergence * slopes.first);
      if (a.target_grad) store_some<V>(a.target_grad + i, last - i, of_divergence * slopes.second);
    }
  }
}

template <class V> void second(const LpgArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const double c = double(*a.upstream) / double(a.rows);
  const V zero = {}, of_policy = splat<V>(S(c * a.rule.sign)), of_divergence = splat<V>(S(c * a.rule.alpha));
  const auto above = [&](const S* from, int64_t i, int64_t left) { return from ? load_some<V>(from + i, left, S(0)) : zero; };
  for (int64_t index = begin; index < end; index++) {
    const Block b = block_of(a, index);
    Sum<V> policy, divergence;
    if (a.probs_grad) clear(a.probs_grad + b.begin * a.actions, b.rows * a.actions);
    for (int64_t i = 0; i < b.rows; i += L) {
      const int64_t row = b.begin + i, left = b.rows - i;
      const V p = gathered<V>(a, a.probs, row, left, S(1)), q = load_some<V>(a.adjustment + row, left, S(0));
      const V above_p = a.above_probs ? gathered<V>(a, a.above_probs, row, left, S(0)) : zero;
      const auto d = lpg_policy_second(p, q, above_p, above(a.above_adjustment, row, left));
      policy.add(d.sum);
      if (a.probs_grad) scattered<V>(a, a.probs_grad, row, left, of_policy * d.first);
      if (a.adjustment_grad) store_some<V>(a.adjustment_grad + row, left, of_policy * d.second);
    }
    const int64_t first = b.begin * a.width, last = first + b.rows * a.width;
    for (int64_t i = first; i < last; i += L) {
      const int64_t left = last - i;
      const V y = load_some<V>(a.y + i, left, S(0)), target = load_some<V>(a.target + i, left, S(0));
      const auto d = lpg_divergence_second(y, target, above(a.above_y, i, left), above(a.above_target, i, left));
      divergence.add(d.sum);
      if (a.y_grad) store_some<V>(a.y_grad + i, left, of_divergence * d.first);
      if (a.target_grad) store_some<V>(a.target_grad + i, left, of_divergence * d.second);
    }
    a.sums[index * kLpgSums + kLpgPolicy] = policy.result();
    a.sums[index * kLpgSums + kLpgDivergence] = divergence.result();
  }
}

}  // namespace

extern const InnerLossCpu inner_loss_cpu;
const InnerLossCpu inner_loss_cpu = {&loss<VecF>,        &loss<double>, &gradients<VecF>,
                                     &gradients<double>, &second<VecF>, &second<double>};

}  // namespace PK_ISA
}  // namespace prefkern
