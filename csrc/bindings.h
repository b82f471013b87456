// Argument structs and launchers for Python: used by module.cpp, and by tests/simt, which offers the same launchers over
// CUDA kernels that run on the CPU. Pointers are plain integers (tensor.data_ptr(), array.ctypes.data); nothing is
// checked, nothing is kept alive.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "advantages/group_stats.h"
#include "core/cuda_runtime.h"
#include "logprobs/logits_fold.h"
#include "policy/importance.h"
#include "policy/token_loss.h"

namespace prefkern {
namespace py = pybind11;

// A pointer member as an integer property; 0 is null.
template <class C, class P> void bind_pointer(py::class_<C>& c, const char* name, P* C::* member) {
  c.def_property(
      name, [member](const C& a) { return reinterpret_cast<uintptr_t>(a.*member); },
      [member](C& a, uintptr_t p) { a.*member = reinterpret_cast<P*>(p); });
}

template <class S> void bind_logit_structs(py::module_& m, const std::string& suffix) {
  using Transform = LogitTransform<S>;
  py::class_<Transform> t(m, ("LogitTransform" + suffix).c_str());
  t.def(py::init<>())
      .def_readwrite("scale", &Transform::scale)
      .def_readwrite("softcap", &Transform::softcap)
      .def_readwrite("temperature", &Transform::temperature);
  bind_pointer(t, "bias", &Transform::bias);
  bind_pointer(t, "row_temperature", &Transform::row_temperature);

  using Block = LogitBlock<S>;
  py::class_<Block> b(m, ("LogitBlock" + suffix).c_str());
  b.def(py::init<>())
      .def_readwrite("dtype", &Block::dtype)
      .def_readwrite("rows", &Block::rows)
      .def_readwrite("cols", &Block::cols)
      .def_readwrite("first_col", &Block::first_col)
      .def_readwrite("vocab", &Block::vocab)
      .def_readwrite("ignore_index", &Block::ignore_index)
      .def_readwrite("transform", &Block::transform);
  bind_pointer(b, "targets", &Block::targets);

  using Fold = FoldArgs<S>;
  py::class_<Fold> f(m, ("FoldArgs" + suffix).c_str());
  f.def(py::init<>())
      .def_readwrite("block", &Fold::block)
      .def_readwrite("logits_map", &Fold::logits_map)
      .def_readwrite("entropy", &Fold::entropy)
      .def_readwrite("extra", &Fold::extra)
      .def_readwrite("first", &Fold::first)
      .def_readwrite("last", &Fold::last)
      .def_readwrite("state_stride", &Fold::state_stride);
  bind_pointer(f, "logits", &Fold::logits);
  bind_pointer(f, "state", &Fold::state);
  bind_pointer(f, "logp", &Fold::logp);
  bind_pointer(f, "out_entropy", &Fold::out_entropy);
  bind_pointer(f, "lse", &Fold::lse);
  bind_pointer(f, "sum_sq_probs", &Fold::sum_sq_probs);
  bind_pointer(f, "mean_logit", &Fold::mean_logit);
  bind_pointer(f, "is_top1", &Fold::is_top1);
  bind_pointer(f, "row_max", &Fold::row_max);
  bind_pointer(f, "row_log2_sum", &Fold::row_log2_sum);

  using Grad = GradArgs<S>;
  py::class_<Grad> g(m, ("GradArgs" + suffix).c_str());
  g.def(py::init<>())
      .def_readwrite("block", &Grad::block)
      .def_readwrite("logits_map", &Grad::logits_map)
      .def_readwrite("grad_dtype", &Grad::grad_dtype)
      .def_readwrite("grad_map", &Grad::grad_map);
  bind_pointer(g, "logits", &Grad::logits);
  bind_pointer(g, "grad", &Grad::grad);
  bind_pointer(g, "row_max", &Grad::row_max);
  bind_pointer(g, "row_log2_sum", &Grad::row_log2_sum);
  bind_pointer(g, "entropy", &Grad::entropy);
  bind_pointer(g, "g_logp", &Grad::g_logp);
  bind_pointer(g, "g_entropy", &Grad::g_entropy);
  bind_pointer(g, "g_lse", &Grad::g_lse);
}

template <class S> void bind_group_structs(py::module_& m, const std::string& suffix) {
  using Group = GroupArgs<S>;
  py::class_<Group> g(m, ("GroupArgs" + suffix).c_str());
  g.def(py::init<>()).def_readwrite("rule", &Group::rule).def_readwrite("count", &Group::count);
  bind_pointer(g, "rewards", &Group::rewards);
  bind_pointer(g, "group", &Group::group);
  bind_pointer(g, "order", &Group::order);
  bind_pointer(g, "advantages", &Group::advantages);
  bind_pointer(g, "mean", &Group::mean);
  bind_pointer(g, "std", &Group::std);
  bind_pointer(g, "sizes", &Group::sizes);
}

template <class S> void bind_policy_structs(py::module_& m, const std::string& suffix) {
  using Loss = PolicyArgs<S>;
  py::class_<Loss> l(m, ("PolicyArgs" + suffix).c_str());
  l.def(py::init<>())
      .def_readwrite("options", &Loss::options)
      .def_readwrite("layout", &Loss::layout)
      .def_readwrite("token_advantages", &Loss::token_advantages)
      .def_readwrite("token_weights", &Loss::token_weights)
      .def_readwrite("token_eps_low", &Loss::token_eps_low)
      .def_readwrite("token_eps_high", &Loss::token_eps_high)
      .def_readwrite("slices", &Loss::slices);
  bind_pointer(l, "logp", &Loss::logp);
  bind_pointer(l, "old_logp", &Loss::old_logp);
  bind_pointer(l, "ref_logp", &Loss::ref_logp);
  bind_pointer(l, "advantages", &Loss::advantages);
  bind_pointer(l, "weights", &Loss::weights);
  bind_pointer(l, "eps_low", &Loss::eps_low);
  bind_pointer(l, "eps_high", &Loss::eps_high);
  bind_pointer(l, "entropy", &Loss::entropy);
  bind_pointer(l, "anchor", &Loss::anchor);
  bind_pointer(l, "norm", &Loss::norm);
  bind_pointer(l, "mask", &Loss::mask);
  bind_pointer(l, "grad", &Loss::grad);
  bind_pointer(l, "loss", &Loss::loss);
  bind_pointer(l, "metrics", &Loss::metrics);
  bind_pointer(l, "inverse_norm", &Loss::inverse_norm);
  bind_pointer(l, "partials", &Loss::partials);
  bind_pointer(l, "row_partials", &Loss::row_partials);
  bind_pointer(l, "finished", &Loss::finished);

  using Grad = PolicyGradArgs<S>;
  py::class_<Grad> g(m, ("PolicyGradArgs" + suffix).c_str());
  g.def(py::init<>()).def_readwrite("tokens", &Grad::tokens);
  bind_pointer(g, "unnormalised", &Grad::unnormalised);
  bind_pointer(g, "upstream", &Grad::upstream);
  bind_pointer(g, "inverse_norm", &Grad::inverse_norm);
  bind_pointer(g, "grad", &Grad::grad);

  using Weight = WeightArgs<S>;
  py::class_<Weight> w(m, ("WeightArgs" + suffix).c_str());
  w.def(py::init<>())
      .def_readwrite("options", &Weight::options)
      .def_readwrite("layout", &Weight::layout)
      .def_readwrite("slices", &Weight::slices);
  bind_pointer(w, "old_logp", &Weight::old_logp);
  bind_pointer(w, "rollout_logp", &Weight::rollout_logp);
  bind_pointer(w, "mask", &Weight::mask);
  bind_pointer(w, "weights", &Weight::weights);
  bind_pointer(w, "partials", &Weight::partials);
  bind_pointer(w, "row_weights", &Weight::row_weights);
  bind_pointer(w, "finished", &Weight::finished);

  using Off = OffPolicyArgs<S>;
  py::class_<Off> o(m, ("OffPolicyArgs" + suffix).c_str());
  o.def(py::init<>())
      .def_readwrite("layout", &Off::layout)
      .def_readwrite("threshold", &Off::threshold)
      .def_readwrite("slices", &Off::slices);
  bind_pointer(o, "advantages", &Off::advantages);
  bind_pointer(o, "logp", &Off::logp);
  bind_pointer(o, "rollout_logp", &Off::rollout_logp);
  bind_pointer(o, "mask", &Off::mask);
  bind_pointer(o, "keep", &Off::keep);
  bind_pointer(o, "partials", &Off::partials);
  bind_pointer(o, "finished", &Off::finished);
}

inline void bind_argument_structs(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::f32)
      .value("bfloat16", DType::bf16)
      .value("float16", DType::f16)
      .value("float64", DType::f64);
  py::class_<RowMap>(m, "RowMap",
                     "Row r starts (r // inner) * outer_stride + (r % inner) * inner_stride elements after the base.")
      .def(py::init<>())
      .def_readwrite("inner", &RowMap::inner)
      .def_readwrite("outer_stride", &RowMap::outer_stride)
      .def_readwrite("inner_stride", &RowMap::inner_stride);
  bind_logit_structs<float>(m, "");
  bind_logit_structs<double>(m, "64");

  py::enum_<AdvantageEstimator>(m, "AdvantageEstimator")
      .value("grpo", AdvantageEstimator::grpo)
      .value("dr_grpo", AdvantageEstimator::dr_grpo)
      .value("rloo", AdvantageEstimator::rloo);
  py::enum_<SingletonRule>(m, "SingletonRule").value("zero", SingletonRule::zero).value("reward", SingletonRule::reward);
  py::class_<AdvantageRule>(m, "AdvantageRule")
      .def(py::init<>())
      .def_readwrite("estimator", &AdvantageRule::estimator)
      .def_readwrite("singleton", &AdvantageRule::singleton)
      .def_readwrite("eps", &AdvantageRule::eps);
  bind_group_structs<float>(m, "");
  bind_group_structs<double>(m, "64");

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
  py::class_<PolicyOptions>(m, "PolicyOptions")
      .def(py::init<>())
      .def_readwrite("kind", &PolicyOptions::kind)
      .def_readwrite("kl", &PolicyOptions::kl)
      .def_readwrite("agg", &PolicyOptions::agg)
      .def_readwrite("kl_ratio", &PolicyOptions::kl_ratio)
      .def_readwrite("anchor_nll", &PolicyOptions::anchor_nll)
      .def_readwrite("eps_low", &PolicyOptions::eps_low)
      .def_readwrite("eps_high", &PolicyOptions::eps_high)
      .def_readwrite("dual_clip", &PolicyOptions::dual_clip)
      .def_readwrite("delta", &PolicyOptions::delta)
      .def_readwrite("tau_pos", &PolicyOptions::tau_pos)
      .def_readwrite("tau_neg", &PolicyOptions::tau_neg)
      .def_readwrite("beta", &PolicyOptions::beta)
      .def_readwrite("kl_clamp", &PolicyOptions::kl_clamp)
      .def_readwrite("clamp_low", &PolicyOptions::clamp_low)
      .def_readwrite("clamp_high", &PolicyOptions::clamp_high)
      .def_readwrite("anchor_gamma", &PolicyOptions::anchor_gamma)
      .def_readwrite("scale", &PolicyOptions::scale)
      .def_readwrite("norm", &PolicyOptions::norm);
  py::enum_<WeightLevel>(m, "WeightLevel")
      .value("token", WeightLevel::token)
      .value("sequence", WeightLevel::sequence)
      .value("geometric", WeightLevel::geometric);
  py::enum_<WeightMode>(m, "WeightMode").value("truncate", WeightMode::truncate).value("mask", WeightMode::mask);
  py::class_<WeightOptions>(m, "WeightOptions")
      .def(py::init<>())
      .def_readwrite("level", &WeightOptions::level)
      .def_readwrite("mode", &WeightOptions::mode)
      .def_readwrite("normalize", &WeightOptions::normalize)
      .def_readwrite("clip_min", &WeightOptions::clip_min)
      .def_readwrite("clip_max", &WeightOptions::clip_max)
      .def_readwrite("log_clamp", &WeightOptions::log_clamp);
  py::class_<SequenceLayout> layout(m, "SequenceLayout");
  layout.def(py::init<>())
      .def_readwrite("sequences", &SequenceLayout::sequences)
      .def_readwrite("padded_length", &SequenceLayout::padded_length)
      .def_readwrite("tokens", &SequenceLayout::tokens);
  bind_pointer(layout, "cu_seqlens", &SequenceLayout::cu_seqlens);
  m.def("policy_slices", &policy_slices, py::arg("layout"), "How many blocks share a sequence on CUDA.");
  m.attr("POLICY_SUMS") = int(kPolicySums);
  m.attr("POLICY_ROW_SUMS") = int(kPolicyRowSums);
  m.attr("POLICY_METRICS") = int(kPolicyMetrics);
  bind_policy_structs<float>(m, "");
  bind_policy_structs<double>(m, "64");
}

template <class Args> void bind_cpu(py::module_& m, const char* name, void (*launch)(const Args&)) {
  m.def(name, launch, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

template <class Args> void bind_cuda(py::module_& m, const char* name, int (*launch)(const Args&, void*)) {
  m.def(
      name,
      [launch](const Args& args, uintptr_t stream) {
        const int error = launch(args, reinterpret_cast<void*>(stream));
        if (error != 0) throw std::runtime_error(cuda_error_string(error));
      },
      py::arg("args"), py::arg("stream") = 0, py::call_guard<py::gil_scoped_release>());
}

inline void bind_cpu_launchers(py::module_& m) {
  bind_cpu<FoldArgs<float>>(m, "cpu_fold_logits", &cpu_fold_logits);
  bind_cpu<FoldArgs<double>>(m, "cpu_fold_logits64", &cpu_fold_logits);
  bind_cpu<GradArgs<float>>(m, "cpu_grad_logits", &cpu_grad_logits);
  bind_cpu<GradArgs<double>>(m, "cpu_grad_logits64", &cpu_grad_logits);
  m.def("cpu_group_advantages", static_cast<int64_t (*)(const GroupArgs<float>&)>(&cpu_group_advantages), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_group_advantages64", static_cast<int64_t (*)(const GroupArgs<double>&)>(&cpu_group_advantages), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  bind_cpu<PolicyArgs<float>>(m, "cpu_policy_loss", &cpu_policy_loss);
  bind_cpu<PolicyArgs<double>>(m, "cpu_policy_loss64", &cpu_policy_loss);
  bind_cpu<PolicyGradArgs<float>>(m, "cpu_policy_loss_backward", &cpu_policy_loss_backward);
  bind_cpu<PolicyGradArgs<double>>(m, "cpu_policy_loss_backward64", &cpu_policy_loss_backward);
  bind_cpu<WeightArgs<float>>(m, "cpu_importance_weights", &cpu_importance_weights);
  bind_cpu<WeightArgs<double>>(m, "cpu_importance_weights64", &cpu_importance_weights);
  bind_cpu<OffPolicyArgs<float>>(m, "cpu_off_policy_mask", &cpu_off_policy_mask);
  bind_cpu<OffPolicyArgs<double>>(m, "cpu_off_policy_mask64", &cpu_off_policy_mask);
}

inline void bind_cuda_launchers(py::module_& m) {
  bind_cuda(m, "cuda_fold_logits", &cuda_fold_logits);
  bind_cuda(m, "cuda_grad_logits", &cuda_grad_logits);
  bind_cuda(m, "cuda_group_advantages", &cuda_group_advantages);
  bind_cuda(m, "cuda_policy_loss", &cuda_policy_loss);
  bind_cuda(m, "cuda_policy_loss_backward", &cuda_policy_loss_backward);
  bind_cuda(m, "cuda_importance_weights", &cuda_importance_weights);
  bind_cuda(m, "cuda_off_policy_mask", &cuda_off_policy_mask);
}

}  // namespace prefkern
