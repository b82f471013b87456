// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "preference/pair_loss.h"
#include "preference/posterior.h"

namespace prefkern {

template <class S> void bind_preference_structs(py::module_& m, const std::string& suffix) {
  using Pairs = PreferenceArgs<S>;
  Struct<Pairs> p(m, "PreferenceArgs" + suffix);
  p.member("options", &Pairs::options).member("reduction", &Pairs::reduction).member("pairs", &Pairs::pairs);
  p.member("each", &Pairs::each).member("given_norm", &Pairs::given_norm);
  p.member("chosen", &Pairs::chosen);
  p.member("rejected", &Pairs::rejected);
  p.member("ref_chosen", &Pairs::ref_chosen);
  p.member("ref_rejected", &Pairs::ref_rejected);
  p.member("chosen_length", &Pairs::chosen_length);
  p.member("rejected_length", &Pairs::rejected_length);
  p.member("scale", &Pairs::scale);
  p.member("offset", &Pairs::offset);
  p.member("smoothing", &Pairs::smoothing);
  p.member("chosen_target", &Pairs::chosen_target);
  p.member("rejected_target", &Pairs::rejected_target);
  p.member("weight", &Pairs::weight);
  p.member("tie", &Pairs::tie);
  p.member("desirable", &Pairs::desirable);
  p.member("mask", &Pairs::mask);
  p.member("norm", &Pairs::norm);
  p.member("losses", &Pairs::losses);
  p.member("grads", &Pairs::grads);
  p.member("loss", &Pairs::loss);
  p.member("metrics", &Pairs::metrics);
  p.member("inverse_norm", &Pairs::inverse_norm);
  p.member("partials", &Pairs::partials);
  p.member("finished", &Pairs::finished);

  using Grad = PreferenceGradArgs<S>;
  Struct<Grad> g(m, "PreferenceGradArgs" + suffix);
  g.member("pairs", &Grad::pairs).member("sides", &Grad::sides).member("vector", &Grad::vector);
  g.member("unnormalised", &Grad::unnormalised);
  g.member("upstream", &Grad::upstream);
  g.member("inverse_norm", &Grad::inverse_norm);
  g.member("grad", &Grad::grad);

  using Posterior = PosteriorArgs<S>;
  Struct<Posterior> l(m, "PosteriorArgs" + suffix);
  l.member("pairs", &Posterior::pairs).member("annotators", &Posterior::annotators);
  l.member("margin", &Posterior::margin);
  l.member("reliability", &Posterior::reliability);
  l.member("annotator", &Posterior::annotator);
  l.member("posterior", &Posterior::posterior);
}

inline void bind_preference(py::module_& m) {
  py::enum_<PreferenceKind>(m, "PreferenceKind")
      .value("sigmoid", PreferenceKind::sigmoid)
      .value("hinge", PreferenceKind::hinge)
      .value("squared", PreferenceKind::squared)
      .value("exo", PreferenceKind::exo)
      .value("nca", PreferenceKind::nca)
      .value("bco", PreferenceKind::bco)
      .value("targets", PreferenceKind::targets)
      .value("apo_zero", PreferenceKind::apo_zero)
      .value("apo_down", PreferenceKind::apo_down)
      .value("discopop", PreferenceKind::discopop)
      .value("dpop", PreferenceKind::dpop)
      .value("focal", PreferenceKind::focal)
      .value("rao_kupper", PreferenceKind::rao_kupper)
      .value("davidson", PreferenceKind::davidson)
      .value("exponential", PreferenceKind::exponential)
      .value("truncated_quadratic", PreferenceKind::truncated_quadratic)
      .value("savage", PreferenceKind::savage)
      .value("cal_dpo", PreferenceKind::cal_dpo)
      .value("linear", PreferenceKind::linear)
      .value("asft", PreferenceKind::asft)
      .value("robust", PreferenceKind::robust);
  py::enum_<UnpairedKind>(m, "UnpairedKind")
      .value("kto", UnpairedKind::kto)
      .value("bco", UnpairedKind::bco)
      .value("squared", UnpairedKind::squared);
  py::enum_<ScoreKind>(m, "ScoreKind")
      .value("reverse_kl", ScoreKind::reverse_kl)
      .value("forward_kl", ScoreKind::forward_kl)
      .value("js", ScoreKind::js)
      .value("alpha", ScoreKind::alpha)
      .value("log_odds", ScoreKind::log_odds)
      .value("chi", ScoreKind::chi)
      .value("exp", ScoreKind::exp);
  py::enum_<LengthAverage>(m, "LengthAverage")
      .value("none", LengthAverage::none)
      .value("logp", LengthAverage::logp)
      .value("score", LengthAverage::score);
  py::enum_<PairReduction>(m, "PairReduction")
      .value("mean", PairReduction::mean)
      .value("weighted_mean", PairReduction::weighted_mean)
      .value("sum", PairReduction::sum)
      .value("none", PairReduction::none);
  Struct<PreferenceOptions>(m, "PreferenceOptions")
      .member("kind", &PreferenceOptions::kind)
      .member("unpaired", &PreferenceOptions::unpaired)
      .member("score", &PreferenceOptions::score)
      .member("average", &PreferenceOptions::average)
      .member("beta", &PreferenceOptions::beta)
      .member("rejected_beta", &PreferenceOptions::rejected_beta)
      .member("chosen_reward", &PreferenceOptions::chosen_reward)
      .member("rejected_reward", &PreferenceOptions::rejected_reward)
      .member("scale", &PreferenceOptions::scale)
      .member("offset", &PreferenceOptions::offset)
      .member("smoothing", &PreferenceOptions::smoothing)
      .member("chosen_target", &PreferenceOptions::chosen_target)
      .member("rejected_target", &PreferenceOptions::rejected_target)
      .member("alpha", &PreferenceOptions::alpha)
      .member("exp_cap", &PreferenceOptions::exp_cap)
      .member("max_p", &PreferenceOptions::max_p)
      .member("parameter", &PreferenceOptions::parameter)
      .member("clip", &PreferenceOptions::clip)
      .member("factor", &PreferenceOptions::factor)
      .member("chosen_weight", &PreferenceOptions::chosen_weight)
      .member("rejected_weight", &PreferenceOptions::rejected_weight);
  m.def("preference_blocks", &preference_blocks, py::arg("pairs"), "How many blocks take the pairs on CUDA.");
  m.attr("PREFERENCE_SUMS") = int(kPreferenceSums);
  m.attr("PREFERENCE_METRICS") = int(kPreferenceMetrics);
  bind_preference_structs<float>(m, "");
  bind_preference_structs<double>(m, "64");
}

inline void bind_preference_cpu(py::module_& m) {
  bind_cpu<void, PreferenceArgs<float>>(m, "cpu_preference_loss", &cpu_preference_loss);
  bind_cpu<void, PreferenceArgs<double>>(m, "cpu_preference_loss64", &cpu_preference_loss);
  bind_cpu<void, PreferenceGradArgs<float>>(m, "cpu_preference_loss_backward", &cpu_preference_loss_backward);
  bind_cpu<void, PreferenceGradArgs<double>>(m, "cpu_preference_loss_backward64", &cpu_preference_loss_backward);
  bind_cpu<void, PosteriorArgs<float>>(m, "cpu_label_posterior", &cpu_label_posterior);
  bind_cpu<void, PosteriorArgs<double>>(m, "cpu_label_posterior64", &cpu_label_posterior);
}

inline void bind_preference_cuda(py::module_& m) {
  bind_cuda(m, "cuda_preference_loss", &cuda_preference_loss);
  bind_cuda(m, "cuda_preference_loss_backward", &cuda_preference_loss_backward);
  bind_cuda(m, "cuda_label_posterior", &cuda_label_posterior);
}

}  // namespace prefkern
