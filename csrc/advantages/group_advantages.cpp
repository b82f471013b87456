// group_advantages: rewards and group ids in, advantages and the statistics of each row's group out.
#include <cmath>

#include "advantages/group_stats.h"
#include "advantages/ops.h"
#include "core/arguments.h"
#include "core/cuda_runtime.h"

namespace prefkern {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S>
GroupArgs<S> group_args(const AdvantageRule& rule, const Tensor& rewards, const Tensor& group, const Outputs& out) {
  GroupArgs<S> a;
  a.rule = rule;
  a.count = rewards.numel();
  a.rewards = data<S>(rewards);
  a.group = data<int64_t>(group);
  a.advantages = mutable_data<S>(std::get<0>(out));
  a.mean = mutable_data<S>(std::get<1>(out));
  a.std = mutable_data<S>(std::get<2>(out));
  a.sizes = mutable_data<int64_t>(std::get<3>(out));
  return a;
}

template <class S> void run_cpu(const GroupArgs<S>& a) {
  const int64_t bad = cpu_group_advantages(a);
  check_value(bad < 0, "rewards[", bad, "] is ", bad < 0 ? S(0) : a.rewards[bad], "; every reward must be finite");
}

}  // namespace

Outputs group_advantages(const Tensor& rewards, const Tensor& group, int64_t estimator, double eps, int64_t singleton) {
  const DType acc = accumulator(float_dtype(rewards, "rewards"));
  check_value(rewards.dim() == 1, "rewards has shape ", shape_text(rewards), "; expected [B]");
  const Tensor g = checked_group(group, rewards, "rewards");
  check_value(estimator >= 0 && estimator <= 2, "estimator is ", estimator, "; accepted: 0 to 2");
  check_value(singleton >= 0 && singleton <= 1, "singleton is ", singleton, "; accepted: 0, 1");
  check_value(eps >= 0 && std::isfinite(eps), "eps is ", eps, "; it must be finite and not negative");
  const OnDevice guard(rewards);
  const ScalarType st = scalar_type(acc);
  const int64_t count = rewards.size(0);
  const Tensor r = to_contiguous(cast(rewards, st));
  const Outputs out{empty({count}, st, r), empty({count}, st, r), empty({count}, st, r), empty({count}, ScalarType::Long, r)};
  if (count == 0) return out;

  const AdvantageRule rule{static_cast<AdvantageEstimator>(estimator), static_cast<SingletonRule>(singleton), eps};
  if (r.is_cuda()) {
    GroupArgs<float> a = group_args<float>(rule, r, g, out);
    std::optional<std::pair<Tensor, Tensor>> sorted;  // alive until the launch is enqueued
    if (count > kSortGroupsAbove) {
      sorted = sort_ids(g);
      a.group = data<int64_t>(sorted->first);
      a.order = data<int64_t>(sorted->second);
    }
    check_cuda(cuda_group_advantages(a, current_stream(r)));
  } else if (acc == DType::f64) {
    run_cpu(group_args<double>(rule, r, g, out));
  } else {
    run_cpu(group_args<float>(rule, r, g, out));
  }
  return out;
}

}  // namespace prefkern
