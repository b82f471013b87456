// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "policy/importance.h"
#include "policy/token_loss.h"

namespace prefkern {

template <class S> void bind_policy_structs(py::module_& m, const std::string& suffix) {
  using Loss = PolicyArgs<S>;
  Struct<Loss> l(m, "PolicyArgs" + suffix);
  l.member("options", &Loss::options)
      .member("layout", &Loss::layout)
      .member("token_advantages", &Loss::token_advantages)
      .member("token_weights", &Loss::token_weights)
      .member("token_eps_low", &Loss::token_eps_low)
      .member("token_eps_high", &Loss::token_eps_high)
      .member("slices", &Loss::slices);
  l.member("logp", &Loss::logp);
  l.member("old_logp", &Loss::old_logp);
  l.member("ref_logp", &Loss::ref_logp);
  l.member("advantages", &Loss::advantages);
  l.member("weights", &Loss::weights);
  l.member("eps_low", &Loss::eps_low);
  l.member("eps_high", &Loss::eps_high);
  l.member("entropy", &Loss::entropy);
  l.member("anchor", &Loss::anchor);
  l.member("norm", &Loss::norm);
  l.member("mask", &Loss::mask);
  l.member("grad", &Loss::grad);
  l.member("loss", &Loss::loss);
  l.member("metrics", &Loss::metrics);
  l.member("inverse_norm", &Loss::inverse_norm);
  l.member("partials", &Loss::partials);
  l.member("row_partials", &Loss::row_partials);
  l.member("finished", &Loss::finished);

  using Grad = PolicyGradArgs<S>;
  Struct<Grad> g(m, "PolicyGradArgs" + suffix);
  g.member("tokens", &Grad::tokens);
  g.member("unnormalised", &Grad::unnormalised);
  g.member("upstream", &Grad::upstream);
  g.member("inverse_norm", &Grad::inverse_norm);
  g.member("grad", &Grad::grad);

  using Weight = WeightArgs<S>;
  Struct<Weight> w(m, "WeightArgs" + suffix);
  w.member("options", &Weight::options).member("layout", &Weight::layout).member("slices", &Weight::slices);
  w.member("old_logp", &Weight::old_logp);
  w.member("rollout_logp", &Weight::rollout_logp);
  w.member("mask", &Weight::mask);
  w.member("weights", &Weight::weights);
  w.member("partials", &Weight::partials);
  w.member("row_weights", &Weight::row_weights);
  w.member("finished", &Weight::finished);

  using Off = OffPolicyArgs<S>;
  Struct<Off> o(m, "OffPolicyArgs" + suffix);
  o.member("layout", &Off::layout).member("threshold", &Off::threshold).member("slices", &Off::slices);
  o.member("advantages", &Off::advantages);
  o.member("logp", &Off::logp);
  o.member("rollout_logp", &Off::rollout_logp);
  o.member("mask", &Off::mask);
  o.member("keep", &Off::keep);
  o.member("partials", &Off::partials);
  o.member("finished", &Off::finished);
}

inline void bind_policy(py::module_& m) {
  py::enum_<PolicyKind>(m, "PolicyKind")
      .value("clip", PolicyKind::clip)
      .value("cispo", PolicyKind::cispo)
      .value("reinforce", PolicyKind::reinforce)
      .value("sapo", PolicyKind::sapo)
      .value("gspo", PolicyKind::gspo)
      .value("gspo_token", PolicyKind::gspo_token)
      .value("gmpo", PolicyKind::gmpo)
      .value("none", PolicyKind::none);
  py::enum_<KlKind>(m, "KlKind")
      .value("none", KlKind::none)
      .value("k1", KlKind::k1)
      .value("abs", KlKind::abs)
      .value("k2", KlKind::k2)
      .value("k3", KlKind::k3)
      .value("k1_plus", KlKind::k1_plus)
      .value("abs_plus", KlKind::abs_plus)
      .value("k3_plus", KlKind::k3_plus);
  py::enum_<Aggregation>(m, "Aggregation")
      .value("token_mean", Aggregation::token_mean)
      .value("seq_mean_token_mean", Aggregation::seq_mean_token_mean)
      .value("seq_mean_token_sum", Aggregation::seq_mean_token_sum)
      .value("seq_mean_token_sum_norm", Aggregation::seq_mean_token_sum_norm)
      .value("token_sum", Aggregation::token_sum)
      .value("trl_grpo", Aggregation::trl_grpo)
      .value("trl_dr_grpo", Aggregation::trl_dr_grpo);
  Struct<PolicyOptions>(m, "PolicyOptions")
      .member("kind", &PolicyOptions::kind)
      .member("kl", &PolicyOptions::kl)
      .member("agg", &PolicyOptions::agg)
      .member("kl_ratio", &PolicyOptions::kl_ratio)
      .member("anchor_nll", &PolicyOptions::anchor_nll)
      .member("eps_low", &PolicyOptions::eps_low)
      .member("eps_high", &PolicyOptions::eps_high)
      .member("dual_clip", &PolicyOptions::dual_clip)
      .member("delta", &PolicyOptions::delta)
      .member("tau_pos", &PolicyOptions::tau_pos)
      .member("tau_neg", &PolicyOptions::tau_neg)
      .member("beta", &PolicyOptions::beta)
      .member("kl_clamp", &PolicyOptions::kl_clamp)
      .member("clamp_low", &PolicyOptions::clamp_low)
      .member("clamp_high", &PolicyOptions::clamp_high)
      .member("anchor_gamma", &PolicyOptions::anchor_gamma)
      .member("scale", &PolicyOptions::scale)
      .member("norm", &PolicyOptions::norm);
  py::enum_<WeightLevel>(m, "WeightLevel")
      .value("token", WeightLevel::token)
      .value("sequence", WeightLevel::sequence)
      .value("geometric", WeightLevel::geometric);
  py::enum_<WeightMode>(m, "WeightMode").value("truncate", WeightMode::truncate).value("mask", WeightMode::mask);
  Struct<WeightOptions>(m, "WeightOptions")
      .member("level", &WeightOptions::level)
      .member("mode", &WeightOptions::mode)
      .member("normalize", &WeightOptions::normalize)
      .member("clip_min", &WeightOptions::clip_min)
      .member("clip_max", &WeightOptions::clip_max)
      .member("log_clamp", &WeightOptions::log_clamp);
  m.def("policy_slices", &policy_slices, py::arg("layout"), "How many blocks share a sequence on CUDA.");
  m.attr("POLICY_SUMS") = int(kPolicySums);
  m.attr("POLICY_ROW_SUMS") = int(kPolicyRowSums);
  m.attr("POLICY_METRICS") = int(kPolicyMetrics);
  bind_policy_structs<float>(m, "");
  bind_policy_structs<double>(m, "64");
}

inline void bind_policy_cpu(py::module_& m) {
  bind_cpu<void, PolicyArgs<float>>(m, "cpu_policy_loss", &cpu_policy_loss);
  bind_cpu<void, PolicyArgs<double>>(m, "cpu_policy_loss64", &cpu_policy_loss);
  bind_cpu<void, PolicyGradArgs<float>>(m, "cpu_policy_loss_backward", &cpu_policy_loss_backward);
  bind_cpu<void, PolicyGradArgs<double>>(m, "cpu_policy_loss_backward64", &cpu_policy_loss_backward);
  bind_cpu<void, WeightArgs<float>>(m, "cpu_importance_weights", &cpu_importance_weights);
  bind_cpu<void, WeightArgs<double>>(m, "cpu_importance_weights64", &cpu_importance_weights);
  bind_cpu<void, OffPolicyArgs<float>>(m, "cpu_off_policy_mask", &cpu_off_policy_mask);
  bind_cpu<void, OffPolicyArgs<double>>(m, "cpu_off_policy_mask64", &cpu_off_policy_mask);
}

inline void bind_policy_cuda(py::module_& m) {
  bind_cuda(m, "cuda_policy_loss", &cuda_policy_loss);
  bind_cuda(m, "cuda_policy_loss_backward", &cuda_policy_loss_backward);
  bind_cuda(m, "cuda_importance_weights", &cuda_importance_weights);
  bind_cuda(m, "cuda_off_policy_mask", &cuda_off_policy_mask);
}

}  // namespace prefkern
