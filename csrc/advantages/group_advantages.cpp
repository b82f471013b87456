// group_advantages: rewards and group ids in, advantages and, if asked for, the statistics of each row's group out.
#include <cmath>

#include "advantages/group_stats.h"
#include "advantages/ops.h"
#include "core/arguments.h"
#include "core/cuda_runtime.h"

namespace prefkern {
namespace {

template <class E> E option(const char* name, int64_t value, E last) {
  const auto accepted = static_cast<int64_t>(last);
  check_value(value >= 0 && value <= accepted, name, " is ", value, "; accepted: 0 to ", accepted);
  return static_cast<E>(value);
}

void check_eps(const char* name, double eps) {
  check_value(eps >= 0 && std::isfinite(eps), name, " is ", eps, "; it must be finite and not negative");
}

// Everything but pointers.
template <class S> GroupArgs<S> group_args(const Tensor& rewards, const GroupOptions& o) {
  GroupArgs<S> a;
  a.rule.estimator = option("estimator", o.estimator, AdvantageEstimator::pass_at_k_no_std);
  a.rule.singleton = option("singleton", o.singleton, SingletonRule::calibrate);
  a.nan = option("nan", o.nan, NanRule::ignore);
  a.batch = option("batch", o.batch, BatchRule::nonzero);
  check_value(o.combine >= 0 && o.combine <= 1, "combine is ", o.combine, "; accepted: 0, 1");
  check_value(o.ddof >= 0 && o.ddof <= 1, "ddof is ", o.ddof, "; accepted: 0, 1");
  check_eps("eps", o.eps);
  check_eps("batch_eps", o.batch_eps);
  check_value(std::isfinite(o.virtual_value), "virtual_value is ", o.virtual_value, "; it must be finite");
  check_value(o.virtual_count >= 0, "virtual_count is ", o.virtual_count, "; it must not be negative");
  check_value(o.virtual_count == 0 || a.rule.estimator <= AdvantageEstimator::dr_grpo, "virtual_count is ", o.virtual_count,
              "; virtual samples go with the estimators 'grpo' and 'dr_grpo'");
  a.rule.ddof = static_cast<int32_t>(o.ddof);
  a.rule.eps = o.eps;
  a.rule.virtual_value = o.virtual_value;
  a.rule.virtual_count = static_cast<double>(o.virtual_count);
  a.count = rewards.size(0);
  a.columns = rewards.dim() == 2 ? rewards.size(1) : 1;
  check_value(a.columns >= 1 && a.columns <= kMaxColumns, "rewards has shape ", shape_text(rewards), "; 1 to ",
              int64_t(kMaxColumns), " columns are accepted");
  a.combine_first = o.combine == 0;
  a.batch_eps = o.batch_eps;
  if (a.batch == BatchRule::std || a.batch == BatchRule::nonzero)
    check_value(a.combine_first, "batch is '", a.batch == BatchRule::std ? "std" : "nonzero",
                "' with combine 'normalize_then_sum'; it needs one reward per sample, from 'sum_then_normalize'");
  if (a.batch == BatchRule::std) {
    check_value(a.rule.estimator <= AdvantageEstimator::dr_grpo,
                "batch is 'std', which divides by the batch; accepted with the estimators 'grpo' and 'dr_grpo'");
    a.rule.estimator = AdvantageEstimator::dr_grpo;
  }
  return a;
}

template <class S> void set_weights(GroupArgs<S>& a, const OptTensor& weights, const Tensor& rewards, OptTensor& keep) {
  if (!weights) return;
  float_dtype(*weights, "weights");
  check_value(weights->dim() == 1 && weights->size(0) == a.columns, "weights has shape ", shape_text(*weights),
              "; rewards has shape ", shape_text(rewards), ", so [", a.columns, "] is expected");
  a.weighted = true;
  keep = to_contiguous(cast(*weights, ScalarType::Double));
  if (keep->is_cpu()) {
    for (int64_t k = 0; k < a.columns; k++) {
      a.weight[k] = data<double>(*keep)[k];
      check_value(std::isfinite(a.weight[k]), "weights[", k, "] is ", a.weight[k], "; every weight must be finite");
    }
  } else {
    check_same_device(*weights, "weights", rewards, "rewards");
    a.device_weight = data<double>(*keep);
  }
}

std::string element(const char* name, const Tensor& t, int64_t at) {
  std::string text = std::string(name) + "[" + std::to_string(t.dim() == 2 ? at / t.size(1) : at);
  return text + (t.dim() == 2 ? ", " + std::to_string(at % t.size(1)) : "") + "]";
}

template <class S> void run_cpu(const GroupArgs<S>& a, const Tensor& rewards) {
  const GroupFault fault = cpu_group_advantages(a);
  if (fault.kind == GroupFault::none) return;
  check_value(fault.kind != GroupFault::reward, element("rewards", rewards, fault.at), " is ",
              fault.kind == GroupFault::reward ? a.rewards[fault.at] : S(0), "; every reward must be finite",
              a.nan == NanRule::error ? "" : " or NaN");
  check_value(fault.kind != GroupFault::length, "lengths[", fault.at, "] is ",
              fault.kind == GroupFault::length ? a.lengths[fault.at] : 0, "; it must not be negative");
  check_value(fault.kind != GroupFault::no_tokens, "lengths of the group of row ", fault.at,
              " add up to 0; opo weighs by them");
  check_value(false, "lengths add up to ", fault.at, "; batch 'token' needs at least 2 tokens");
}

struct GroupOutputs {
  Tensor advantages;
  OptTensor mean, std, count, min, max;
};

template <class S>
GroupOutputs run(const Tensor& rewards, const Tensor& group, const OptTensor& weights, const OptTensor& lengths,
                 const GroupOptions& o, int64_t outputs) {
  GroupArgs<S> a = group_args<S>(rewards, o);
  OptTensor keep_weights, n;
  set_weights(a, weights, rewards, keep_weights);
  if (lengths) n = checked_lengths(*lengths, rewards, "rewards");
  check_value(n || (a.rule.estimator != AdvantageEstimator::opo && a.batch != BatchRule::token),
              "lengths is None; estimator 'opo' and batch 'token' need it");
  check_value(outputs >= 0 && outputs < 32, "outputs is ", outputs, "; accepted: 0 to 31");
  const Tensor g = checked_group(group, rewards, "rewards");
  const OnDevice guard(rewards);
  const ScalarType st = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor r = to_contiguous(cast(rewards, st));

  GroupOutputs out{empty({a.count}, st, r), {}, {}, {}, {}, {}};
  const bool table = !a.combine_first && r.dim() == 2;
  const auto statistic = [&](OptTensor& into, int64_t bit, ScalarType type) {
    if (outputs >> bit & 1) into = table ? empty({a.count, a.columns}, type, r) : empty({a.count}, type, r);
  };
  statistic(out.mean, 0, st);
  statistic(out.std, 1, st);
  statistic(out.count, 2, ScalarType::Long);
  statistic(out.min, 3, st);
  statistic(out.max, 4, st);
  if (a.count == 0) return out;

  const auto address = [](const OptTensor& t) { return t ? mutable_data<S>(*t) : nullptr; };
  a.rewards = data<S>(r);
  a.group = data<int64_t>(g);
  a.lengths = data_or_null<int64_t>(n);
  a.advantages = mutable_data<S>(out.advantages);
  a.mean = address(out.mean);
  a.std = address(out.std);
  a.min = address(out.min);
  a.max = address(out.max);
  a.sizes = out.count ? mutable_data<int64_t>(*out.count) : nullptr;
  OptTensor values;
  if (a.batch != BatchRule::none || (r.is_cuda() && estimated_columns(a) > 1)) {
    values = empty({a.count}, ScalarType::Double, r);
    a.values = mutable_data<double>(*values);
  }
  if constexpr (sizeof(S) == 4) {
    if (r.is_cuda()) {
      const GroupIds groups(g);
      a.group = groups.ids;
      a.order = groups.order;
      check_cuda(cuda_group_advantages(a, current_stream(r)));
      return out;
    }
  }
  run_cpu(a, r);
  return out;
}

GroupOutputs dispatch(const Tensor& rewards, const Tensor& group, const OptTensor& weights, const OptTensor& lengths,
                      const GroupOptions& o, int64_t outputs) {
  const DType dtype = float_dtype(rewards, "rewards");
  check_value(rewards.dim() == 1 || rewards.dim() == 2, "rewards has shape ", shape_text(rewards), "; expected [B] or [B, K]");
  return dtype == DType::f64 ? run<double>(rewards, group, weights, lengths, o, outputs)
                             : run<float>(rewards, group, weights, lengths, o, outputs);
}

}  // namespace

Tensor checked_lengths(const Tensor& lengths, const Tensor& rows_of, const char* rows_name) {
  check_type(lengths.scalar_type() == ScalarType::Long || lengths.scalar_type() == ScalarType::Int, "lengths has dtype ",
             dtype_name(lengths.scalar_type()), "; accepted: int64, int32");
  check_value(lengths.dim() == 1 && lengths.size(0) == rows_of.size(0), "lengths has shape ", shape_text(lengths), "; ",
              rows_name, " has shape ", shape_text(rows_of), ", so [", rows_of.size(0), "] is expected");
  check_same_device(lengths, "lengths", rows_of, rows_name);
  return to_contiguous(cast(lengths, ScalarType::Long));
}

#define PK_GROUP_PARAMETERS                                                                                                   \
  const Tensor &rewards, const Tensor &group, const OptTensor &weights, const OptTensor &lengths, int64_t estimator,          \
      int64_t singleton, int64_t ddof, double eps, int64_t combine, int64_t nan, double virtual_value, int64_t virtual_count, \
      int64_t batch, double batch_eps
#define PK_GROUP_OPTIONS {estimator, singleton, ddof, combine, nan, virtual_count, batch, eps, virtual_value, batch_eps}

Tensor group_advantages(PK_GROUP_PARAMETERS) {
  return dispatch(rewards, group, weights, lengths, PK_GROUP_OPTIONS, 0).advantages;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantages_stats(PK_GROUP_PARAMETERS, int64_t outputs) {
  const GroupOutputs out = dispatch(rewards, group, weights, lengths, PK_GROUP_OPTIONS, outputs);
  const auto or_nothing = [&](const OptTensor& t, ScalarType type) { return t ? *t : empty({0}, type, out.advantages); };
  const ScalarType st = out.advantages.scalar_type();
  return {out.advantages,          or_nothing(out.mean, st), or_nothing(out.std, st), or_nothing(out.count, ScalarType::Long),
          or_nothing(out.min, st), or_nothing(out.max, st)};
}

}  // namespace prefkern
