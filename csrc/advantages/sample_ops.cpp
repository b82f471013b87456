// question_weights and pair_masked_advantages: the ops on tensors.
#include <cmath>

#include "advantages/group_stats.h"
#include "advantages/masked_pairs.h"
#include "advantages/ops.h"
#include "advantages/question_weights.h"
#include "core/arguments.h"
#include "core/cuda_runtime.h"

namespace prefkern {
namespace {

// `t` [B] like `rewards`, contiguous, of the type that the kernel takes; every element looked at on the CPU.
Tensor checked_rows(const Tensor& t, const char* name, const Tensor& rewards) {
  const ScalarType type = scalar_type(accumulator(float_dtype(rewards, "rewards")));
  float_dtype(t, name);
  check_value(rewards.dim() == 1, "rewards has shape ", shape_text(rewards), "; expected [B]");
  check_same_device(t, name, rewards, "rewards");
  check_value(same_shape(t, rewards), name, " has shape ", shape_text(t), "; rewards has shape ", shape_text(rewards),
              ", so the same is expected");
  const Tensor out = to_contiguous(cast(t, type));
  const auto look = [&](const auto* p) {
    for (int64_t i = 0; i < out.numel(); i++)
      check_value(std::isfinite(p[i]), name, "[", i, "] is ", p[i], "; it must be finite");
  };
  if (out.is_cpu()) type == ScalarType::Double ? look(data<double>(out)) : look(data<float>(out));
  return out;
}

void check_not_negative(const char* name, double value) {
  check_value(value >= 0 && std::isfinite(value), name, " is ", value, "; it must be finite and not negative");
}

uint8_t* flags(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> question_weights(const Tensor& rewards, const Tensor& group, const OptTensor& lengths,
                                                    const OptTensor& main_rewards, double temperature, double tol,
                                                    bool zero_accuracy_as_easy) {
  check_value(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
              "; it must be finite and positive");
  check_not_negative("tol", tol);
  const OnDevice guard(rewards);
  const Tensor r = checked_rows(rewards, "rewards", rewards);
  const Tensor main = main_rewards ? checked_rows(*main_rewards, "main_rewards", rewards) : r;
  const Tensor g = checked_group(group, rewards, "rewards");
  OptTensor n;
  if (lengths) {
    n = checked_lengths(*lengths, rewards, "rewards");
    if (n->is_cpu())
      for (int64_t i = 0; i < n->numel(); i++)
        check_value(data<int64_t>(*n)[i] >= 0, "lengths[", i, "] is ", data<int64_t>(*n)[i], "; it must not be negative");
  }
  const Tensor weights = empty({r.size(0)}, r.scalar_type(), r), valid = empty({r.size(0)}, ScalarType::Bool, r);
  const Tensor scale = empty({}, r.scalar_type(), r);
  const auto run = [&](auto a, const auto& launch) {
    using S = std::remove_cvref_t<decltype(*a.rewards)>;
    a.count = r.size(0);
    a.temperature = temperature;
    a.tol = tol;
    a.zero_as_easy = zero_accuracy_as_easy;
    a.rewards = data<S>(r);
    a.main = data<S>(main);
    a.lengths = data_or_null<int64_t>(n);
    a.weights = mutable_data<S>(weights);
    a.scale = mutable_data<S>(scale);
    a.valid = flags(valid);
    const GroupIds groups(g);
    a.group = groups.ids;
    a.order = groups.order;
    launch(a);
  };
  if (r.is_cuda()) {
    const Tensor difficulty = empty({r.size(0)}, ScalarType::Double, r), first = empty({r.size(0)}, ScalarType::Bool, r);
    run(QuestionArgs<float>{}, [&](QuestionArgs<float>& a) {
      a.difficulty = mutable_data<double>(difficulty);
      a.first = flags(first);
      check_cuda(cuda_question_weights(a, current_stream(r)));
    });
  } else {
    const auto launch = [](auto& a) {
      check_value(cpu_question_weights(a), "lengths of the valid questions add up to 0; at least one token is needed");
    };
    if (r.scalar_type() == ScalarType::Double) run(QuestionArgs<double>{}, launch);
    else run(QuestionArgs<float>{}, launch);
  }
  return {weights, valid, scale};
}

std::tuple<Tensor, Tensor, Tensor> pair_masked_advantages(const Tensor& rewards, const Tensor& scores, const Tensor& group,
                                                          double tau, int64_t mode, int64_t level, double eps, int64_t ddof,
                                                          int64_t sigma, bool renormalise) {
  check_value(!std::isnan(tau), "tau is ", tau, "; it must be a number");
  check_not_negative("eps", eps);
  for (const auto& [name, value] : {std::pair{"mode", mode}, {"level", level}, {"ddof", ddof}, {"sigma", sigma}})
    check_value(value == 0 || value == 1, name, " is ", value, "; accepted: 0, 1");
  const OnDevice guard(rewards);
  const Tensor r = checked_rows(rewards, "rewards", rewards), q = checked_rows(scores, "scores", rewards);
  const Tensor g = checked_group(group, rewards, "rewards");
  const Tensor advantages = empty({r.size(0)}, r.scalar_type(), r), kept = empty({r.size(0)}, ScalarType::Bool, r);
  const Tensor masked = empty({r.size(0)}, ScalarType::Long, r), values = empty({r.size(0)}, ScalarType::Double, r);
  const auto run = [&](auto a, const auto& launch) {
    using S = std::remove_cvref_t<decltype(*a.rewards)>;
    a.count = r.size(0);
    a.tau = tau;
    a.eps = eps;
    a.ddof = static_cast<int32_t>(ddof);
    a.mode = static_cast<PairMode>(mode);
    a.whole_samples = level == 1;
    a.sigma_of_kept = sigma == 1;
    a.renormalise = renormalise;
    a.rewards = data<S>(r);
    a.scores = data<S>(q);
    a.values = mutable_data<double>(values);
    a.advantages = mutable_data<S>(advantages);
    a.kept = flags(kept);
    a.masked = mutable_data<int64_t>(masked);
    const GroupIds groups(g);
    a.group = groups.ids;
    a.order = groups.order;
    launch(a);
  };
  if (r.is_cuda())
    run(MaskedPairArgs<float>{}, [&](MaskedPairArgs<float>& a) { check_cuda(cuda_masked_pairs(a, current_stream(r))); });
  else if (r.scalar_type() == ScalarType::Double) run(MaskedPairArgs<double>{}, [](auto& a) { cpu_masked_pairs(a); });
  else run(MaskedPairArgs<float>{}, [](auto& a) { cpu_masked_pairs(a); });
  return {advantages, kept, masked};
}

}  // namespace prefkern
