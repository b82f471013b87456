// Argument structs and launchers for Python: used by module.cpp, and by tests/simt, which offers the same launchers over
// CUDA kernels that run on the CPU. Pointers are plain integers (tensor.data_ptr(), array.ctypes.data); nothing is
// checked, nothing is kept alive.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "advantages/group_stats.h"
#include "advantages/masked_pairs.h"
#include "advantages/moments.h"
#include "advantages/question_weights.h"
#include "conflicts/runs.h"
#include "core/cuda_runtime.h"
#include "filters/select.h"
#include "groups/group_folds.h"
#include "groups/pair_walk.h"
#include "logprobs/logits_fold.h"
#include "policy/importance.h"
#include "policy/token_loss.h"
#include "sequence/returns.h"
#include "sequence/sequence_sums.h"

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

template <class S> void bind_advantage_structs(py::module_& m, const std::string& suffix) {
  using Group = GroupArgs<S>;
  py::class_<Group> g(m, ("GroupArgs" + suffix).c_str());
  g.def(py::init<>())
      .def_readwrite("rule", &Group::rule)
      .def_readwrite("count", &Group::count)
      .def_readwrite("columns", &Group::columns)
      .def_readwrite("combine_first", &Group::combine_first)
      .def_readwrite("nan", &Group::nan)
      .def_readwrite("batch", &Group::batch)
      .def_readwrite("batch_eps", &Group::batch_eps)
      .def("set_weights",
           [](Group& a, const std::vector<double>& weights) {
             if (weights.size() > kMaxColumns) throw std::invalid_argument("too many weights");
             a.weighted = true;
             std::copy(weights.begin(), weights.end(), a.weight);
           })
      .def_readwrite("weighted", &Group::weighted);
  bind_pointer(g, "device_weight", &Group::device_weight);
  bind_pointer(g, "rewards", &Group::rewards);
  bind_pointer(g, "group", &Group::group);
  bind_pointer(g, "order", &Group::order);
  bind_pointer(g, "lengths", &Group::lengths);
  bind_pointer(g, "values", &Group::values);
  bind_pointer(g, "advantages", &Group::advantages);
  bind_pointer(g, "mean", &Group::mean);
  bind_pointer(g, "std", &Group::std);
  bind_pointer(g, "min", &Group::min);
  bind_pointer(g, "max", &Group::max);
  bind_pointer(g, "sizes", &Group::sizes);

  using Moments = MomentsArgs<S>;
  py::class_<Moments> o(m, ("MomentsArgs" + suffix).c_str());
  o.def(py::init<>()).def_readwrite("count", &Moments::count);
  bind_pointer(o, "values", &Moments::values);
  bind_pointer(o, "weights", &Moments::weights);
  bind_pointer(o, "mask", &Moments::mask);
  bind_pointer(o, "parts", &Moments::parts);
  bind_pointer(o, "moments", &Moments::moments);

  using Normalize = BatchNormalizeArgs<S>;
  py::class_<Normalize> n(m, ("BatchNormalizeArgs" + suffix).c_str());
  n.def(py::init<>())
      .def_readwrite("count", &Normalize::count)
      .def_readwrite("mode", &Normalize::mode)
      .def_readwrite("eps", &Normalize::eps);
  bind_pointer(n, "values", &Normalize::values);
  bind_pointer(n, "mask", &Normalize::mask);
  bind_pointer(n, "moments", &Normalize::moments);
  bind_pointer(n, "out", &Normalize::out);

  using Question = QuestionArgs<S>;
  py::class_<Question> q(m, ("QuestionArgs" + suffix).c_str());
  q.def(py::init<>())
      .def_readwrite("count", &Question::count)
      .def_readwrite("temperature", &Question::temperature)
      .def_readwrite("tol", &Question::tol)
      .def_readwrite("zero_as_easy", &Question::zero_as_easy);
  bind_pointer(q, "rewards", &Question::rewards);
  bind_pointer(q, "main", &Question::main);
  bind_pointer(q, "group", &Question::group);
  bind_pointer(q, "order", &Question::order);
  bind_pointer(q, "lengths", &Question::lengths);
  bind_pointer(q, "difficulty", &Question::difficulty);
  bind_pointer(q, "first", &Question::first);
  bind_pointer(q, "weights", &Question::weights);
  bind_pointer(q, "scale", &Question::scale);
  bind_pointer(q, "valid", &Question::valid);

  using Pairs = MaskedPairArgs<S>;
  py::class_<Pairs> p(m, ("MaskedPairArgs" + suffix).c_str());
  p.def(py::init<>())
      .def_readwrite("count", &Pairs::count)
      .def_readwrite("tau", &Pairs::tau)
      .def_readwrite("eps", &Pairs::eps)
      .def_readwrite("ddof", &Pairs::ddof)
      .def_readwrite("mode", &Pairs::mode)
      .def_readwrite("whole_samples", &Pairs::whole_samples)
      .def_readwrite("sigma_of_kept", &Pairs::sigma_of_kept)
      .def_readwrite("renormalise", &Pairs::renormalise);
  bind_pointer(p, "rewards", &Pairs::rewards);
  bind_pointer(p, "scores", &Pairs::scores);
  bind_pointer(p, "group", &Pairs::group);
  bind_pointer(p, "order", &Pairs::order);
  bind_pointer(p, "values", &Pairs::values);
  bind_pointer(p, "advantages", &Pairs::advantages);
  bind_pointer(p, "kept", &Pairs::kept);
  bind_pointer(p, "masked", &Pairs::masked);
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

template <class S> void bind_sequence_structs(py::module_& m, const std::string& suffix) {
  using Sum = SequenceSumArgs<S>;
  py::class_<Sum> s(m, ("SequenceSumArgs" + suffix).c_str());
  s.def(py::init<>())
      .def_readwrite("transform", &Sum::transform)
      .def_readwrite("mean", &Sum::mean)
      .def_readwrite("layout", &Sum::layout);
  bind_pointer(s, "values", &Sum::values);
  bind_pointer(s, "minus", &Sum::minus);
  bind_pointer(s, "weights", &Sum::weights);
  bind_pointer(s, "mask", &Sum::mask);
  bind_pointer(s, "sums", &Sum::sums);
  bind_pointer(s, "upstream", &Sum::upstream);
  bind_pointer(s, "grad", &Sum::grad);

  using Returns = ReturnsArgs<S>;
  py::class_<Returns> r(m, ("ReturnsArgs" + suffix).c_str());
  r.def(py::init<>()).def_readwrite("rule", &Returns::rule).def_readwrite("layout", &Returns::layout);
  bind_pointer(r, "rewards", &Returns::rewards);
  bind_pointer(r, "values", &Returns::values);
  bind_pointer(r, "mask", &Returns::mask);
  bind_pointer(r, "lengths", &Returns::lengths);
  bind_pointer(r, "finished", &Returns::finished);
  bind_pointer(r, "last_values", &Returns::last_values);
  bind_pointer(r, "advantages", &Returns::advantages);
  bind_pointer(r, "returns", &Returns::returns);

  using Segmented = SegmentedArgs<S>;
  py::class_<Segmented> g(m, ("SegmentedArgs" + suffix).c_str());
  g.def(py::init<>()).def_readwrite("gamma", &Segmented::gamma).def_readwrite("count", &Segmented::count);
  bind_pointer(g, "rewards", &Segmented::rewards);
  bind_pointer(g, "segment", &Segmented::segment);
  bind_pointer(g, "place", &Segmented::place);
  bind_pointer(g, "rows", &Segmented::rows);
  bind_pointer(g, "returns", &Segmented::returns);
}

template <class S> void bind_fold_structs(py::module_& m, const std::string& suffix) {
  using Reduce = GroupReduceArgs<S>;
  py::class_<Reduce> r(m, ("GroupReduceArgs" + suffix).c_str());
  r.def(py::init<>()).def_readwrite("reduction", &Reduce::reduction).def_readwrite("rows", &Reduce::rows);
  bind_pointer(r, "values", &Reduce::values);
  bind_pointer(r, "mask", &Reduce::mask);
  bind_pointer(r, "result", &Reduce::result);

  using Normalize = NormalizeArgs<S>;
  py::class_<Normalize> n(m, ("NormalizeArgs" + suffix).c_str());
  n.def(py::init<>()).def_readwrite("rule", &Normalize::rule).def_readwrite("rows", &Normalize::rows);
  bind_pointer(n, "x", &Normalize::x);
  bind_pointer(n, "z", &Normalize::z);
  bind_pointer(n, "scale", &Normalize::scale);
  bind_pointer(n, "slope", &Normalize::slope);

  using Grad = NormalizeGradArgs<S>;
  py::class_<Grad> g(m, ("NormalizeGradArgs" + suffix).c_str());
  g.def(py::init<>()).def_readwrite("rows", &Grad::rows);
  bind_pointer(g, "upstream", &Grad::upstream);
  bind_pointer(g, "z", &Grad::z);
  bind_pointer(g, "scale", &Grad::scale);
  bind_pointer(g, "slope", &Grad::slope);
  bind_pointer(g, "grad", &Grad::grad);

  using Pairs = PairArgs<S>;
  py::class_<Pairs> p(m, ("PairArgs" + suffix).c_str());
  p.def(py::init<>()).def_readwrite("rule", &Pairs::rule).def_readwrite("rows", &Pairs::rows);
  bind_pointer(p, "scores", &Pairs::scores);
  bind_pointer(p, "levels", &Pairs::levels);
  bind_pointer(p, "unnormalised", &Pairs::unnormalised);
  bind_pointer(p, "loss", &Pairs::loss);
  bind_pointer(p, "pairs", &Pairs::pairs);
  bind_pointer(p, "partials", &Pairs::partials);
  bind_pointer(p, "finished", &Pairs::finished);

  using PairGrad = PairGradArgs<S>;
  py::class_<PairGrad> b(m, ("PairGradArgs" + suffix).c_str());
  b.def(py::init<>()).def_readwrite("count", &PairGrad::count);
  bind_pointer(b, "unnormalised", &PairGrad::unnormalised);
  bind_pointer(b, "upstream", &PairGrad::upstream);
  bind_pointer(b, "pairs", &PairGrad::pairs);
  bind_pointer(b, "grad", &PairGrad::grad);
}

template <class T> void bind_conflict_structs(py::module_& m, const std::string& suffix) {
  using Args = ConflictArgs<T>;
  py::class_<Args> c(m, ("ConflictArgs" + suffix).c_str());
  c.def(py::init<>()).def_readwrite("layout", &Args::layout);
  bind_pointer(c, "tokens", &Args::tokens);
  bind_pointer(c, "advantages", &Args::advantages);
  bind_pointer(c, "advantages64", &Args::advantages64);
  bind_pointer(c, "group", &Args::group);
  bind_pointer(c, "order", &Args::order);
  bind_pointer(c, "mask", &Args::mask);
  bind_pointer(c, "forward", &Args::forward);
  bind_pointer(c, "backward", &Args::backward);
  bind_pointer(c, "length", &Args::length);
}

template <class S> void bind_conflict_weight_structs(py::module_& m, const std::string& suffix) {
  using Args = ConflictWeightArgs<S>;
  py::class_<Args> w(m, ("ConflictWeightArgs" + suffix).c_str());
  w.def(py::init<>()).def_readwrite("rule", &Args::rule).def_readwrite("layout", &Args::layout);
  bind_pointer(w, "advantages", &Args::advantages);
  bind_pointer(w, "forward", &Args::forward);
  bind_pointer(w, "backward", &Args::backward);
  bind_pointer(w, "length", &Args::length);
  bind_pointer(w, "weights", &Args::weights);
}

template <class S> void bind_select_structs(py::module_& m, const std::string& suffix) {
  using Args = SelectArgs<S>;
  py::class_<Args> s(m, ("SelectArgs" + suffix).c_str());
  s.def(py::init<>())
      .def_readwrite("count", &Args::count)
      .def_readwrite("q", &Args::q)
      .def_readwrite("interpolation", &Args::interpolation)
      .def_readwrite("fraction", &Args::fraction);
  bind_pointer(s, "values", &Args::values);
  bind_pointer(s, "mask", &Args::mask);
  bind_pointer(s, "quantile", &Args::quantile);
  bind_pointer(s, "keep", &Args::keep);
  bind_pointer(s, "workspace", &Args::workspace);
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
      .value("rloo", AdvantageEstimator::rloo)
      .value("opo", AdvantageEstimator::opo)
      .value("mad", AdvantageEstimator::mad)
      .value("pass_at_k", AdvantageEstimator::pass_at_k)
      .value("pass_at_k_no_std", AdvantageEstimator::pass_at_k_no_std);
  py::enum_<SingletonRule>(m, "SingletonRule")
      .value("zero", SingletonRule::zero)
      .value("reward", SingletonRule::reward)
      .value("calibrate", SingletonRule::calibrate);
  py::enum_<NanRule>(m, "NanRule").value("error", NanRule::error).value("zero", NanRule::zero).value("ignore", NanRule::ignore);
  py::enum_<BatchRule>(m, "BatchRule")
      .value("none", BatchRule::none)
      .value("std", BatchRule::std)
      .value("seq", BatchRule::seq)
      .value("token", BatchRule::token)
      .value("nonzero", BatchRule::nonzero);
  py::enum_<MomentsMode>(m, "MomentsMode").value("seq", MomentsMode::seq).value("token", MomentsMode::token);
  py::enum_<PairMode>(m, "PairMode").value("gap", PairMode::gap).value("abs", PairMode::abs);
  py::enum_<GroupFault::Kind>(m, "GroupFaultKind")
      .value("none", GroupFault::none)
      .value("reward", GroupFault::reward)
      .value("length", GroupFault::length)
      .value("no_tokens", GroupFault::no_tokens)
      .value("few_tokens", GroupFault::few_tokens);
  py::class_<GroupFault>(m, "GroupFault").def_readonly("kind", &GroupFault::kind).def_readonly("at", &GroupFault::at);
  py::class_<AdvantageRule>(m, "AdvantageRule")
      .def(py::init<>())
      .def_readwrite("estimator", &AdvantageRule::estimator)
      .def_readwrite("singleton", &AdvantageRule::singleton)
      .def_readwrite("ddof", &AdvantageRule::ddof)
      .def_readwrite("eps", &AdvantageRule::eps)
      .def_readwrite("virtual_value", &AdvantageRule::virtual_value)
      .def_readwrite("virtual_count", &AdvantageRule::virtual_count);
  py::class_<MergeArgs> merge(m, "MergeArgs");
  merge.def(py::init<>()).def_readwrite("count", &MergeArgs::count);
  bind_pointer(merge, "parts", &MergeArgs::parts);
  bind_pointer(merge, "moments", &MergeArgs::moments);
  m.attr("MOMENTS_PART") = int64_t(kMomentsPart);
  bind_advantage_structs<float>(m, "");
  bind_advantage_structs<double>(m, "64");

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

  py::enum_<TokenTransform>(m, "TokenTransform").value("none", TokenTransform::none).value("exp", TokenTransform::exp);
  py::enum_<Bootstrap>(m, "Bootstrap")
      .value("repeat", Bootstrap::repeat)
      .value("critic", Bootstrap::critic)
      .value("zero", Bootstrap::zero);
  py::class_<ReturnsRule>(m, "ReturnsRule")
      .def(py::init<>())
      .def_readwrite("bootstrap", &ReturnsRule::bootstrap)
      .def_readwrite("gamma", &ReturnsRule::gamma)
      .def_readwrite("decay", &ReturnsRule::decay);
  bind_sequence_structs<float>(m, "");
  bind_sequence_structs<double>(m, "64");

  py::enum_<GroupReduction>(m, "GroupReduction")
      .value("sum", GroupReduction::sum)
      .value("mean", GroupReduction::mean)
      .value("min", GroupReduction::min)
      .value("max", GroupReduction::max)
      .value("logsumexp", GroupReduction::logsumexp)
      .value("count", GroupReduction::count);
  py::class_<GroupRows> rows(m, "GroupRows");
  rows.def(py::init<>()).def_readwrite("count", &GroupRows::count);
  bind_pointer(rows, "ids", &GroupRows::ids);
  bind_pointer(rows, "order", &GroupRows::order);
  py::class_<NormalizeRule>(m, "NormalizeRule")
      .def(py::init<>())
      .def_readwrite("eps", &NormalizeRule::eps)
      .def_readwrite("ddof", &NormalizeRule::ddof)
      .def_readwrite("sigma_grad", &NormalizeRule::sigma_grad);
  py::class_<PairRule>(m, "PairRule")
      .def(py::init<>())
      .def_readwrite("beta", &PairRule::beta)
      .def_readwrite("anisotropy", &PairRule::anisotropy)
      .def_readwrite("per_response", &PairRule::per_response);
  bind_fold_structs<float>(m, "");
  bind_fold_structs<double>(m, "64");
  py::enum_<ConflictCombine>(m, "ConflictCombine")
      .value("max_once", ConflictCombine::max_once)
      .value("product", ConflictCombine::product);
  py::class_<ConflictRule>(m, "ConflictRule")
      .def(py::init<>())
      .def_readwrite("combine", &ConflictRule::combine)
      .def_readwrite("w_pos", &ConflictRule::w_pos)
      .def_readwrite("w_neg", &ConflictRule::w_neg);
  bind_conflict_structs<int64_t>(m, "");
  bind_conflict_structs<int32_t>(m, "32");
  bind_conflict_weight_structs<float>(m, "");
  bind_conflict_weight_structs<double>(m, "64");

  py::enum_<Interpolation>(m, "Interpolation")
      .value("linear", Interpolation::linear)
      .value("lower", Interpolation::lower)
      .value("higher", Interpolation::higher);
  bind_select_structs<float>(m, "");
  bind_select_structs<double>(m, "64");
  m.def("select_workspace", &select_workspace, py::arg("count"), "8-byte words that the selection kernels need on CUDA.");
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
  m.def("cpu_group_advantages", static_cast<GroupFault (*)(const GroupArgs<float>&)>(&cpu_group_advantages), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_group_advantages64", static_cast<GroupFault (*)(const GroupArgs<double>&)>(&cpu_group_advantages), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  const auto bind_runs = [&m](const char* name, auto launch) {
    m.def(name, launch, py::arg("args"), py::call_guard<py::gil_scoped_release>());
  };
  bind_runs("cpu_conflict_runs", static_cast<int64_t (*)(const ConflictArgs<int64_t>&)>(&cpu_conflict_runs));
  bind_runs("cpu_conflict_runs32", static_cast<int64_t (*)(const ConflictArgs<int32_t>&)>(&cpu_conflict_runs));
  bind_cpu<ConflictWeightArgs<float>>(m, "cpu_conflict_weights", &cpu_conflict_weights);
  bind_cpu<ConflictWeightArgs<double>>(m, "cpu_conflict_weights64", &cpu_conflict_weights);
  bind_cpu<SelectArgs<float>>(m, "cpu_quantile", &cpu_quantile);
  bind_cpu<SelectArgs<double>>(m, "cpu_quantile64", &cpu_quantile);
  bind_cpu<SelectArgs<float>>(m, "cpu_keep_largest", &cpu_keep_largest);
  bind_cpu<SelectArgs<double>>(m, "cpu_keep_largest64", &cpu_keep_largest);
  bind_cpu<SelectArgs<float>>(m, "cpu_keep_from", &cpu_keep_from);
  bind_cpu<SelectArgs<double>>(m, "cpu_keep_from64", &cpu_keep_from);
  bind_cpu<MomentsArgs<float>>(m, "cpu_batch_moments", &cpu_batch_moments);
  bind_cpu<MomentsArgs<double>>(m, "cpu_batch_moments64", &cpu_batch_moments);
  bind_cpu<MergeArgs>(m, "cpu_merge_moments", &cpu_merge_moments);
  bind_cpu<BatchNormalizeArgs<float>>(m, "cpu_batch_normalize", &cpu_batch_normalize);
  bind_cpu<BatchNormalizeArgs<double>>(m, "cpu_batch_normalize64", &cpu_batch_normalize);
  m.def("cpu_question_weights", static_cast<bool (*)(const QuestionArgs<float>&)>(&cpu_question_weights), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_question_weights64", static_cast<bool (*)(const QuestionArgs<double>&)>(&cpu_question_weights), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  bind_cpu<MaskedPairArgs<float>>(m, "cpu_masked_pairs", &cpu_masked_pairs);
  bind_cpu<MaskedPairArgs<double>>(m, "cpu_masked_pairs64", &cpu_masked_pairs);
  bind_cpu<PolicyArgs<float>>(m, "cpu_policy_loss", &cpu_policy_loss);
  bind_cpu<PolicyArgs<double>>(m, "cpu_policy_loss64", &cpu_policy_loss);
  bind_cpu<PolicyGradArgs<float>>(m, "cpu_policy_loss_backward", &cpu_policy_loss_backward);
  bind_cpu<PolicyGradArgs<double>>(m, "cpu_policy_loss_backward64", &cpu_policy_loss_backward);
  bind_cpu<SequenceSumArgs<float>>(m, "cpu_sequence_sums", &cpu_sequence_sums);
  bind_cpu<SequenceSumArgs<double>>(m, "cpu_sequence_sums64", &cpu_sequence_sums);
  bind_cpu<SequenceSumArgs<float>>(m, "cpu_sequence_sums_backward", &cpu_sequence_sums_backward);
  bind_cpu<SequenceSumArgs<double>>(m, "cpu_sequence_sums_backward64", &cpu_sequence_sums_backward);
  bind_cpu<ReturnsArgs<float>>(m, "cpu_returns", &cpu_returns);
  bind_cpu<ReturnsArgs<double>>(m, "cpu_returns64", &cpu_returns);
  m.def("cpu_segmented_returns", static_cast<int64_t (*)(const SegmentedArgs<float>&)>(&cpu_segmented_returns), py::arg("args"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_segmented_returns64", static_cast<int64_t (*)(const SegmentedArgs<double>&)>(&cpu_segmented_returns),
        py::arg("args"), py::call_guard<py::gil_scoped_release>());
  bind_cpu<GroupReduceArgs<float>>(m, "cpu_group_reduce", &cpu_group_reduce);
  bind_cpu<GroupReduceArgs<double>>(m, "cpu_group_reduce64", &cpu_group_reduce);
  bind_cpu<NormalizeArgs<float>>(m, "cpu_group_normalize", &cpu_group_normalize);
  bind_cpu<NormalizeArgs<double>>(m, "cpu_group_normalize64", &cpu_group_normalize);
  bind_cpu<NormalizeGradArgs<float>>(m, "cpu_group_normalize_backward", &cpu_group_normalize_backward);
  bind_cpu<NormalizeGradArgs<double>>(m, "cpu_group_normalize_backward64", &cpu_group_normalize_backward);
  bind_cpu<PairArgs<float>>(m, "cpu_level_pairs", &cpu_level_pairs);
  bind_cpu<PairArgs<double>>(m, "cpu_level_pairs64", &cpu_level_pairs);
  bind_cpu<PairGradArgs<float>>(m, "cpu_level_pairs_backward", &cpu_level_pairs_backward);
  bind_cpu<PairGradArgs<double>>(m, "cpu_level_pairs_backward64", &cpu_level_pairs_backward);
  bind_cpu<WeightArgs<float>>(m, "cpu_importance_weights", &cpu_importance_weights);
  bind_cpu<WeightArgs<double>>(m, "cpu_importance_weights64", &cpu_importance_weights);
  bind_cpu<OffPolicyArgs<float>>(m, "cpu_off_policy_mask", &cpu_off_policy_mask);
  bind_cpu<OffPolicyArgs<double>>(m, "cpu_off_policy_mask64", &cpu_off_policy_mask);
}

inline void bind_cuda_launchers(py::module_& m) {
  bind_cuda(m, "cuda_fold_logits", &cuda_fold_logits);
  bind_cuda(m, "cuda_grad_logits", &cuda_grad_logits);
  bind_cuda(m, "cuda_group_advantages", &cuda_group_advantages);
  bind_cuda<ConflictArgs<int64_t>>(m, "cuda_conflict_runs", &cuda_conflict_runs);
  bind_cuda<ConflictArgs<int32_t>>(m, "cuda_conflict_runs32", &cuda_conflict_runs);
  bind_cuda(m, "cuda_conflict_weights", &cuda_conflict_weights);
  bind_cuda(m, "cuda_quantile", &cuda_quantile);
  bind_cuda(m, "cuda_keep_largest", &cuda_keep_largest);
  bind_cuda(m, "cuda_keep_from", &cuda_keep_from);
  bind_cuda(m, "cuda_batch_moments", &cuda_batch_moments);
  bind_cuda(m, "cuda_merge_moments", &cuda_merge_moments);
  bind_cuda(m, "cuda_batch_normalize", &cuda_batch_normalize);
  bind_cuda(m, "cuda_question_weights", &cuda_question_weights);
  bind_cuda(m, "cuda_masked_pairs", &cuda_masked_pairs);
  bind_cuda(m, "cuda_policy_loss", &cuda_policy_loss);
  bind_cuda(m, "cuda_policy_loss_backward", &cuda_policy_loss_backward);
  bind_cuda(m, "cuda_sequence_sums", &cuda_sequence_sums);
  bind_cuda(m, "cuda_sequence_sums_backward", &cuda_sequence_sums_backward);
  bind_cuda(m, "cuda_returns", &cuda_returns);
  bind_cuda(m, "cuda_segmented_returns", &cuda_segmented_returns);
  bind_cuda(m, "cuda_group_reduce", &cuda_group_reduce);
  bind_cuda(m, "cuda_group_normalize", &cuda_group_normalize);
  bind_cuda(m, "cuda_group_normalize_backward", &cuda_group_normalize_backward);
  bind_cuda(m, "cuda_level_pairs", &cuda_level_pairs);
  bind_cuda(m, "cuda_level_pairs_backward", &cuda_level_pairs_backward);
  bind_cuda(m, "cuda_importance_weights", &cuda_importance_weights);
  bind_cuda(m, "cuda_off_policy_mask", &cuda_off_policy_mask);
}

}  // namespace prefkern
