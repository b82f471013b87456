// Group statistics and advantages in one call, for the CPU and for CUDA. Groups are given by one id per reward: any
// values, in any order, groups of any sizes. A group is always summed in the order of its members in memory, so results
// do not depend on the number of threads.
//
// A sample has one reward, or `columns` of them with a weight each. They are added up first, or every column gets its own
// advantages and these are added up. A batch rule then normalises the advantages of all samples.
//
// S is the element type: float, or double on the CPU. Statistics are in double either way.
#pragma once
#include "core/common.h"
#include "math/advantages.h"

namespace prefkern {

constexpr int kMaxColumns = 64;

template <class S> struct GroupArgs {
  AdvantageRule rule;
  int64_t count = 0;                // B
  int64_t columns = 1;              // K
  bool weighted = false;            // false: all weights are 1
  bool combine_first = true;        // columns are added up before the estimator, not after
  NanRule nan = NanRule::error;
  BatchRule batch = BatchRule::none;
  double batch_eps = 0;
  double weight[kMaxColumns] = {};
  const double* device_weight = nullptr;  // CUDA: if set, instead of `weight`
  const S* rewards = nullptr;       // [B, K]
  const int64_t* group = nullptr;   // ids; on CUDA with `order`: sorted
  const int64_t* order = nullptr;   // CUDA: row of each sorted id (a stable sort); null: ids are in the order of the rows
  const int64_t* lengths = nullptr; // [B], for opo and BatchRule::token
  double* values = nullptr;         // [B], scratch: needed with a batch rule, and on CUDA where columns are added up last
  // Outputs; what is null is not wanted. Statistics are [B], or [B, K] where columns are added up last.
  S *advantages = nullptr, *mean = nullptr, *std = nullptr, *min = nullptr, *max = nullptr;
  int64_t* sizes = nullptr;
};

inline namespace PK_ISA {

template <class S> PK_HD double column_weight(const GroupArgs<S>& a, int64_t k) {
  return !a.weighted ? 1.0 : a.device_weight ? a.device_weight[k] : a.weight[k];
}

// A reward; NaN under NanRule::ignore takes no part.
template <class S> PK_HD double reward_at(const GroupArgs<S>& a, int64_t row, int64_t k) {
  const double r = double(a.rewards[row * a.columns + k]);
  return a.nan == NanRule::zero && r != r ? 0.0 : r;
}
template <class S> PK_HD bool takes_part(const GroupArgs<S>& a, double r) { return a.nan != NanRule::ignore || r == r; }

// sum_k w_k r_k over those that take part; NaN if none does.
template <class S> PK_HD double combined_reward(const GroupArgs<S>& a, int64_t row) {
  double sum = 0;
  bool any = false;
  for (int64_t k = 0; k < a.columns; k++) {
    const double r = reward_at(a, row, k);
    if (!takes_part(a, r)) continue;
    any = true;
    sum += column_weight(a, k) * r;
  }
  return any ? sum : __builtin_nan("");
}

// Of what the estimator sees, how many columns there are, and one of them.
template <class S> PK_HD int64_t estimated_columns(const GroupArgs<S>& a) { return a.combine_first ? 1 : a.columns; }
template <class S> PK_HD double estimated_reward(const GroupArgs<S>& a, int64_t row, int64_t k) {
  return a.combine_first ? combined_reward(a, row) : reward_at(a, row, k);
}
template <class S> PK_HD double estimated_weight(const GroupArgs<S>& a, int64_t k) {
  return a.combine_first ? 1.0 : column_weight(a, k);
}

// NaN for a negative one, which on CUDA is not looked for.
template <class S> PK_HD double row_length(const GroupArgs<S>& a, int64_t row) {
  return a.lengths[row] < 0 ? __builtin_nan("") : double(a.lengths[row]);
}

// Whether group_moments or virtual_moments is all it takes: one plain column, no statistic but mean, std and size.
template <class S> PK_HD bool plain_rule(const GroupArgs<S>& a) {
  return a.columns == 1 && !a.weighted && a.rule.estimator <= AdvantageEstimator::rloo && !a.min && !a.max &&
         a.batch == BatchRule::none;
}

// In `values`, what is left out of the batch stage. No finite reward gives it.
constexpr double kLeftOut = kInfinity;

// How a row enters the moments of the batch stage.
template <class S> PK_HD double batch_weight(const GroupArgs<S>& a, int64_t row) {
  return a.values[row] == kLeftOut ? 0.0 : a.batch == BatchRule::token ? row_length(a, row) : 1.0;
}
template <class S> PK_HD double batch_value(const GroupArgs<S>& a, int64_t row) {
  const bool rewards = a.batch == BatchRule::std || a.batch == BatchRule::nonzero;
  return batch_value(a.batch, a.values[row], rewards ? combined_reward(a, row) : 0.0);
}
template <class S> PK_HD S batch_result(const GroupArgs<S>& a, const Affine& f, int64_t row) {
  return a.values[row] == kLeftOut ? S(0) : S((a.values[row] - f.center) * f.scale);
}

}  // namespace PK_ISA

// What the data can be wrong about: the first element of rewards or lengths, the first row of a group, how many tokens.
struct GroupFault {
  enum Kind : int32_t { none, reward, length, no_tokens, few_tokens } kind = none;
  int64_t at = -1;
};

// Groups of a reward that is not finite are NaN.
PK_API GroupFault cpu_group_advantages(const GroupArgs<float>& args);
PK_API GroupFault cpu_group_advantages(const GroupArgs<double>& args);

// Enqueue on `stream`; returns a cudaError_t. Groups with a reward that is not finite come out NaN.
PK_API int cuda_group_advantages(const GroupArgs<float>& args, void* stream);

}  // namespace prefkern
