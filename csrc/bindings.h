// Argument structs and launchers for Python: used by module.cpp, and by tests/simt, which offers the same launchers over
// CUDA kernels that run on the CPU. Pointers are plain integers (tensor.data_ptr(), array.ctypes.data); nothing is
// checked, nothing is kept alive.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
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

// ---- structs -------------------------------------------------------------------------------------------------------
// pybind11's def_readwrite compiles two functions for every member, and there are hundreds: minutes. Here all members
// share two, which are told where the member is and how its type is converted.
inline void* address(py::handle self, const std::type_info& type, const char* what) {
  py::detail::type_caster_generic caster(type);
  if (!caster.load(self, false))
    throw py::type_error(std::string(what) + ": another struct is expected than " + std::string(py::str(py::type::of(self))));
  return caster.value;
}

// A pointer is an integer, 0 is null; a struct inside a struct is that struct, not a copy.
template <class M> py::object get_member(void* at, py::handle owner) {
  M& member = *static_cast<M*>(at);
  if constexpr (std::is_pointer_v<M>) return py::int_(reinterpret_cast<uintptr_t>(member));
  else if constexpr (std::is_class_v<M>) return py::cast(&member, py::return_value_policy::reference_internal, owner);
  else return py::cast(member);
}
template <class M> void set_member(void* at, py::handle value) {
  M& member = *static_cast<M*>(at);
  if constexpr (std::is_pointer_v<M>) member = reinterpret_cast<M>(value.cast<uintptr_t>());
  else member = value.cast<M>();
}

struct MemberAccess {
  const char* name;
  const std::type_info* type;
  std::ptrdiff_t offset;
  py::object (*get)(void* at, py::handle owner);
  void (*set)(void* at, py::handle value);
  void* in(py::handle self) const { return static_cast<char*>(address(self, *type, name)) + offset; }
};

inline void bind_member(py::handle owner, const MemberAccess& m) {
  const py::cpp_function get([m](py::handle self) { return m.get(m.in(self), self); }, py::is_method(owner));
  const py::cpp_function set([m](py::handle self, py::handle value) { m.set(m.in(self), value); }, py::is_method(owner));
  owner.attr(m.name) = py::module_::import("builtins").attr("property")(get, set);
}

template <class T> class Struct {
 public:
  Struct(py::module_& m, const std::string& name, const char* doc = "") : class_(m, name.c_str(), doc) {
    class_.def(py::init<>());
  }
  template <class M> Struct& member(const char* name, M T::* member) {
    const T sample{};
    const auto offset = reinterpret_cast<const char*>(&(sample.*member)) - reinterpret_cast<const char*>(&sample);
    bind_member(class_, {name, &typeid(T), offset, &get_member<M>, &set_member<M>});
    return *this;
  }
  template <class F> Struct& def(const char* name, F&& f) {
    class_.def(name, std::forward<F>(f));
    return *this;
  }

 private:
  py::class_<T> class_;
};

template <class S> void bind_logit_structs(py::module_& m, const std::string& suffix) {
  using Transform = LogitTransform<S>;
  Struct<Transform> t(m, "LogitTransform" + suffix);
  t.member("scale", &Transform::scale).member("softcap", &Transform::softcap).member("temperature", &Transform::temperature);
  t.member("bias", &Transform::bias);
  t.member("row_temperature", &Transform::row_temperature);

  using Block = LogitBlock<S>;
  Struct<Block> b(m, "LogitBlock" + suffix);
  b.member("dtype", &Block::dtype)
      .member("rows", &Block::rows)
      .member("cols", &Block::cols)
      .member("first_col", &Block::first_col)
      .member("vocab", &Block::vocab)
      .member("ignore_index", &Block::ignore_index)
      .member("transform", &Block::transform);
  b.member("targets", &Block::targets);

  using Fold = FoldArgs<S>;
  Struct<Fold> f(m, "FoldArgs" + suffix);
  f.member("block", &Fold::block)
      .member("logits_map", &Fold::logits_map)
      .member("entropy", &Fold::entropy)
      .member("extra", &Fold::extra)
      .member("first", &Fold::first)
      .member("last", &Fold::last)
      .member("state_stride", &Fold::state_stride);
  f.member("logits", &Fold::logits);
  f.member("state", &Fold::state);
  f.member("logp", &Fold::logp);
  f.member("out_entropy", &Fold::out_entropy);
  f.member("lse", &Fold::lse);
  f.member("sum_sq_probs", &Fold::sum_sq_probs);
  f.member("mean_logit", &Fold::mean_logit);
  f.member("is_top1", &Fold::is_top1);
  f.member("row_max", &Fold::row_max);
  f.member("row_log2_sum", &Fold::row_log2_sum);

  using Grad = GradArgs<S>;
  Struct<Grad> g(m, "GradArgs" + suffix);
  g.member("block", &Grad::block)
      .member("logits_map", &Grad::logits_map)
      .member("grad_dtype", &Grad::grad_dtype)
      .member("grad_map", &Grad::grad_map);
  g.member("logits", &Grad::logits);
  g.member("grad", &Grad::grad);
  g.member("row_max", &Grad::row_max);
  g.member("row_log2_sum", &Grad::row_log2_sum);
  g.member("entropy", &Grad::entropy);
  g.member("g_logp", &Grad::g_logp);
  g.member("g_entropy", &Grad::g_entropy);
  g.member("g_lse", &Grad::g_lse);
}

template <class S> void bind_advantage_structs(py::module_& m, const std::string& suffix) {
  using Group = GroupArgs<S>;
  Struct<Group> g(m, "GroupArgs" + suffix);
  g.member("rule", &Group::rule)
      .member("count", &Group::count)
      .member("columns", &Group::columns)
      .member("combine_first", &Group::combine_first)
      .member("nan", &Group::nan)
      .member("batch", &Group::batch)
      .member("batch_eps", &Group::batch_eps)
      .def("set_weights",
           [](Group& a, const std::vector<double>& weights) {
             if (weights.size() > kMaxColumns) throw std::invalid_argument("too many weights");
             a.weighted = true;
             std::copy(weights.begin(), weights.end(), a.weight);
           })
      .member("weighted", &Group::weighted);
  g.member("device_weight", &Group::device_weight);
  g.member("rewards", &Group::rewards);
  g.member("group", &Group::group);
  g.member("order", &Group::order);
  g.member("lengths", &Group::lengths);
  g.member("values", &Group::values);
  g.member("advantages", &Group::advantages);
  g.member("mean", &Group::mean);
  g.member("std", &Group::std);
  g.member("min", &Group::min);
  g.member("max", &Group::max);
  g.member("sizes", &Group::sizes);

  using Moments = MomentsArgs<S>;
  Struct<Moments> o(m, "MomentsArgs" + suffix);
  o.member("count", &Moments::count);
  o.member("values", &Moments::values);
  o.member("weights", &Moments::weights);
  o.member("mask", &Moments::mask);
  o.member("parts", &Moments::parts);
  o.member("moments", &Moments::moments);

  using Normalize = BatchNormalizeArgs<S>;
  Struct<Normalize> n(m, "BatchNormalizeArgs" + suffix);
  n.member("count", &Normalize::count).member("mode", &Normalize::mode).member("eps", &Normalize::eps);
  n.member("values", &Normalize::values);
  n.member("mask", &Normalize::mask);
  n.member("moments", &Normalize::moments);
  n.member("out", &Normalize::out);

  using Question = QuestionArgs<S>;
  Struct<Question> q(m, "QuestionArgs" + suffix);
  q.member("count", &Question::count)
      .member("temperature", &Question::temperature)
      .member("tol", &Question::tol)
      .member("zero_as_easy", &Question::zero_as_easy);
  q.member("rewards", &Question::rewards);
  q.member("main", &Question::main);
  q.member("group", &Question::group);
  q.member("order", &Question::order);
  q.member("lengths", &Question::lengths);
  q.member("difficulty", &Question::difficulty);
  q.member("first", &Question::first);
  q.member("weights", &Question::weights);
  q.member("scale", &Question::scale);
  q.member("valid", &Question::valid);

  using Pairs = MaskedPairArgs<S>;
  Struct<Pairs> p(m, "MaskedPairArgs" + suffix);
  p.member("count", &Pairs::count)
      .member("tau", &Pairs::tau)
      .member("eps", &Pairs::eps)
      .member("ddof", &Pairs::ddof)
      .member("mode", &Pairs::mode)
      .member("whole_samples", &Pairs::whole_samples)
      .member("sigma_of_kept", &Pairs::sigma_of_kept)
      .member("renormalise", &Pairs::renormalise);
  p.member("rewards", &Pairs::rewards);
  p.member("scores", &Pairs::scores);
  p.member("group", &Pairs::group);
  p.member("order", &Pairs::order);
  p.member("values", &Pairs::values);
  p.member("advantages", &Pairs::advantages);
  p.member("kept", &Pairs::kept);
  p.member("masked", &Pairs::masked);
}

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

template <class S> void bind_sequence_structs(py::module_& m, const std::string& suffix) {
  using Sum = SequenceSumArgs<S>;
  Struct<Sum> s(m, "SequenceSumArgs" + suffix);
  s.member("transform", &Sum::transform).member("mean", &Sum::mean).member("layout", &Sum::layout);
  s.member("values", &Sum::values);
  s.member("minus", &Sum::minus);
  s.member("weights", &Sum::weights);
  s.member("mask", &Sum::mask);
  s.member("sums", &Sum::sums);
  s.member("upstream", &Sum::upstream);
  s.member("grad", &Sum::grad);

  using Returns = ReturnsArgs<S>;
  Struct<Returns> r(m, "ReturnsArgs" + suffix);
  r.member("rule", &Returns::rule).member("layout", &Returns::layout);
  r.member("rewards", &Returns::rewards);
  r.member("values", &Returns::values);
  r.member("mask", &Returns::mask);
  r.member("lengths", &Returns::lengths);
  r.member("finished", &Returns::finished);
  r.member("last_values", &Returns::last_values);
  r.member("advantages", &Returns::advantages);
  r.member("returns", &Returns::returns);

  using Segmented = SegmentedArgs<S>;
  Struct<Segmented> g(m, "SegmentedArgs" + suffix);
  g.member("gamma", &Segmented::gamma).member("count", &Segmented::count);
  g.member("rewards", &Segmented::rewards);
  g.member("segment", &Segmented::segment);
  g.member("place", &Segmented::place);
  g.member("rows", &Segmented::rows);
  g.member("returns", &Segmented::returns);
}

template <class S> void bind_fold_structs(py::module_& m, const std::string& suffix) {
  using Reduce = GroupReduceArgs<S>;
  Struct<Reduce> r(m, "GroupReduceArgs" + suffix);
  r.member("reduction", &Reduce::reduction).member("rows", &Reduce::rows);
  r.member("values", &Reduce::values);
  r.member("mask", &Reduce::mask);
  r.member("result", &Reduce::result);

  using Normalize = NormalizeArgs<S>;
  Struct<Normalize> n(m, "NormalizeArgs" + suffix);
  n.member("rule", &Normalize::rule).member("rows", &Normalize::rows);
  n.member("x", &Normalize::x);
  n.member("z", &Normalize::z);
  n.member("scale", &Normalize::scale);
  n.member("slope", &Normalize::slope);

  using Grad = NormalizeGradArgs<S>;
  Struct<Grad> g(m, "NormalizeGradArgs" + suffix);
  g.member("rows", &Grad::rows);
  g.member("upstream", &Grad::upstream);
  g.member("z", &Grad::z);
  g.member("scale", &Grad::scale);
  g.member("slope", &Grad::slope);
  g.member("grad", &Grad::grad);

  using Pairs = PairArgs<S>;
  Struct<Pairs> p(m, "PairArgs" + suffix);
  p.member("rule", &Pairs::rule).member("rows", &Pairs::rows);
  p.member("scores", &Pairs::scores);
  p.member("levels", &Pairs::levels);
  p.member("unnormalised", &Pairs::unnormalised);
  p.member("loss", &Pairs::loss);
  p.member("pairs", &Pairs::pairs);
  p.member("partials", &Pairs::partials);
  p.member("finished", &Pairs::finished);

  using PairGrad = PairGradArgs<S>;
  Struct<PairGrad> b(m, "PairGradArgs" + suffix);
  b.member("count", &PairGrad::count);
  b.member("unnormalised", &PairGrad::unnormalised);
  b.member("upstream", &PairGrad::upstream);
  b.member("pairs", &PairGrad::pairs);
  b.member("grad", &PairGrad::grad);
}

template <class T> void bind_conflict_structs(py::module_& m, const std::string& suffix) {
  using Args = ConflictArgs<T>;
  Struct<Args> c(m, "ConflictArgs" + suffix);
  c.member("layout", &Args::layout);
  c.member("tokens", &Args::tokens);
  c.member("advantages", &Args::advantages);
  c.member("advantages64", &Args::advantages64);
  c.member("group", &Args::group);
  c.member("order", &Args::order);
  c.member("mask", &Args::mask);
  c.member("forward", &Args::forward);
  c.member("backward", &Args::backward);
  c.member("length", &Args::length);
}

template <class S> void bind_conflict_weight_structs(py::module_& m, const std::string& suffix) {
  using Args = ConflictWeightArgs<S>;
  Struct<Args> w(m, "ConflictWeightArgs" + suffix);
  w.member("rule", &Args::rule).member("layout", &Args::layout);
  w.member("advantages", &Args::advantages);
  w.member("forward", &Args::forward);
  w.member("backward", &Args::backward);
  w.member("length", &Args::length);
  w.member("weights", &Args::weights);
}

template <class S> void bind_select_structs(py::module_& m, const std::string& suffix) {
  using Args = SelectArgs<S>;
  Struct<Args> s(m, "SelectArgs" + suffix);
  s.member("count", &Args::count)
      .member("q", &Args::q)
      .member("interpolation", &Args::interpolation)
      .member("fraction", &Args::fraction);
  s.member("values", &Args::values);
  s.member("mask", &Args::mask);
  s.member("quantile", &Args::quantile);
  s.member("keep", &Args::keep);
  s.member("workspace", &Args::workspace);
}

inline void bind_argument_structs(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::f32)
      .value("bfloat16", DType::bf16)
      .value("float16", DType::f16)
      .value("float64", DType::f64);
  Struct<RowMap>(m, "RowMap", "Row r starts (r // inner) * outer_stride + (r % inner) * inner_stride elements after the base.")
      .member("inner", &RowMap::inner)
      .member("outer_stride", &RowMap::outer_stride)
      .member("inner_stride", &RowMap::inner_stride);
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
  Struct<AdvantageRule>(m, "AdvantageRule")
      .member("estimator", &AdvantageRule::estimator)
      .member("singleton", &AdvantageRule::singleton)
      .member("ddof", &AdvantageRule::ddof)
      .member("eps", &AdvantageRule::eps)
      .member("virtual_value", &AdvantageRule::virtual_value)
      .member("virtual_count", &AdvantageRule::virtual_count);
  Struct<MergeArgs> merge(m, "MergeArgs");
  merge.member("count", &MergeArgs::count);
  merge.member("parts", &MergeArgs::parts);
  merge.member("moments", &MergeArgs::moments);
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
  Struct<SequenceLayout> layout(m, "SequenceLayout");
  layout.member("sequences", &SequenceLayout::sequences)
      .member("padded_length", &SequenceLayout::padded_length)
      .member("tokens", &SequenceLayout::tokens);
  layout.member("cu_seqlens", &SequenceLayout::cu_seqlens);
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
  Struct<ReturnsRule>(m, "ReturnsRule")
      .member("bootstrap", &ReturnsRule::bootstrap)
      .member("gamma", &ReturnsRule::gamma)
      .member("decay", &ReturnsRule::decay);
  bind_sequence_structs<float>(m, "");
  bind_sequence_structs<double>(m, "64");

  py::enum_<GroupReduction>(m, "GroupReduction")
      .value("sum", GroupReduction::sum)
      .value("mean", GroupReduction::mean)
      .value("min", GroupReduction::min)
      .value("max", GroupReduction::max)
      .value("logsumexp", GroupReduction::logsumexp)
      .value("count", GroupReduction::count);
  Struct<GroupRows> rows(m, "GroupRows");
  rows.member("count", &GroupRows::count);
  rows.member("ids", &GroupRows::ids);
  rows.member("order", &GroupRows::order);
  Struct<NormalizeRule>(m, "NormalizeRule")
      .member("eps", &NormalizeRule::eps)
      .member("ddof", &NormalizeRule::ddof)
      .member("sigma_grad", &NormalizeRule::sigma_grad);
  Struct<PairRule>(m, "PairRule")
      .member("beta", &PairRule::beta)
      .member("anisotropy", &PairRule::anisotropy)
      .member("per_response", &PairRule::per_response);
  bind_fold_structs<float>(m, "");
  bind_fold_structs<double>(m, "64");
  py::enum_<ConflictCombine>(m, "ConflictCombine")
      .value("max_once", ConflictCombine::max_once)
      .value("product", ConflictCombine::product);
  Struct<ConflictRule>(m, "ConflictRule")
      .member("combine", &ConflictRule::combine)
      .member("w_pos", &ConflictRule::w_pos)
      .member("w_neg", &ConflictRule::w_neg);
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

// ---- launchers -----------------------------------------------------------------------------------------------------
// Likewise one function for all of them. The interpreter's lock is not held while one runs.
struct Launcher {
  const char* name;
  const std::type_info* type;  // of the argument struct
  void (*launch)();
  py::object (*call)(void (*launch)(), const void* args, void* stream);
};

template <class R, class Args> py::object call_cpu(void (*launch)(), const void* args, void*) {
  const auto function = reinterpret_cast<R (*)(const Args&)>(launch);
  const auto run = [&] {
    const py::gil_scoped_release release;
    return function(*static_cast<const Args*>(args));
  };
  if constexpr (std::is_void_v<R>) {
    run();
    return py::none();
  } else {
    return py::cast(run());
  }
}
template <class Args> py::object call_cuda(void (*launch)(), const void* args, void* stream) {
  int error;
  {
    const py::gil_scoped_release release;
    error = reinterpret_cast<int (*)(const Args&, void*)>(launch)(*static_cast<const Args*>(args), stream);
  }
  if (error != 0) throw std::runtime_error(cuda_error_string(error));
  return py::none();
}

template <class R, class Args> void bind_cpu(py::module_& m, const char* name, R (*launch)(const Args&)) {
  const Launcher l{name, &typeid(Args), reinterpret_cast<void (*)()>(launch), &call_cpu<R, Args>};
  m.def(name, [l](py::handle args) { return l.call(l.launch, address(args, *l.type, l.name), nullptr); }, py::arg("args"));
}
template <class Args> void bind_cuda(py::module_& m, const char* name, int (*launch)(const Args&, void*)) {
  const Launcher l{name, &typeid(Args), reinterpret_cast<void (*)()>(launch), &call_cuda<Args>};
  m.def(
      name,
      [l](py::handle args, uintptr_t stream) {
        return l.call(l.launch, address(args, *l.type, l.name), reinterpret_cast<void*>(stream));
      },
      py::arg("args"), py::arg("stream") = 0);
}

inline void bind_cpu_launchers(py::module_& m) {
  bind_cpu<void, FoldArgs<float>>(m, "cpu_fold_logits", &cpu_fold_logits);
  bind_cpu<void, FoldArgs<double>>(m, "cpu_fold_logits64", &cpu_fold_logits);
  bind_cpu<void, GradArgs<float>>(m, "cpu_grad_logits", &cpu_grad_logits);
  bind_cpu<void, GradArgs<double>>(m, "cpu_grad_logits64", &cpu_grad_logits);
  bind_cpu<GroupFault, GroupArgs<float>>(m, "cpu_group_advantages", &cpu_group_advantages);
  bind_cpu<GroupFault, GroupArgs<double>>(m, "cpu_group_advantages64", &cpu_group_advantages);
  bind_cpu<int64_t, ConflictArgs<int64_t>>(m, "cpu_conflict_runs", &cpu_conflict_runs);
  bind_cpu<int64_t, ConflictArgs<int32_t>>(m, "cpu_conflict_runs32", &cpu_conflict_runs);
  bind_cpu<void, ConflictWeightArgs<float>>(m, "cpu_conflict_weights", &cpu_conflict_weights);
  bind_cpu<void, ConflictWeightArgs<double>>(m, "cpu_conflict_weights64", &cpu_conflict_weights);
  bind_cpu<void, SelectArgs<float>>(m, "cpu_quantile", &cpu_quantile);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_quantile64", &cpu_quantile);
  bind_cpu<void, SelectArgs<float>>(m, "cpu_keep_largest", &cpu_keep_largest);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_keep_largest64", &cpu_keep_largest);
  bind_cpu<void, SelectArgs<float>>(m, "cpu_keep_from", &cpu_keep_from);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_keep_from64", &cpu_keep_from);
  bind_cpu<void, MomentsArgs<float>>(m, "cpu_batch_moments", &cpu_batch_moments);
  bind_cpu<void, MomentsArgs<double>>(m, "cpu_batch_moments64", &cpu_batch_moments);
  bind_cpu<void, MergeArgs>(m, "cpu_merge_moments", &cpu_merge_moments);
  bind_cpu<void, BatchNormalizeArgs<float>>(m, "cpu_batch_normalize", &cpu_batch_normalize);
  bind_cpu<void, BatchNormalizeArgs<double>>(m, "cpu_batch_normalize64", &cpu_batch_normalize);
  bind_cpu<bool, QuestionArgs<float>>(m, "cpu_question_weights", &cpu_question_weights);
  bind_cpu<bool, QuestionArgs<double>>(m, "cpu_question_weights64", &cpu_question_weights);
  bind_cpu<void, MaskedPairArgs<float>>(m, "cpu_masked_pairs", &cpu_masked_pairs);
  bind_cpu<void, MaskedPairArgs<double>>(m, "cpu_masked_pairs64", &cpu_masked_pairs);
  bind_cpu<void, PolicyArgs<float>>(m, "cpu_policy_loss", &cpu_policy_loss);
  bind_cpu<void, PolicyArgs<double>>(m, "cpu_policy_loss64", &cpu_policy_loss);
  bind_cpu<void, PolicyGradArgs<float>>(m, "cpu_policy_loss_backward", &cpu_policy_loss_backward);
  bind_cpu<void, PolicyGradArgs<double>>(m, "cpu_policy_loss_backward64", &cpu_policy_loss_backward);
  bind_cpu<void, SequenceSumArgs<float>>(m, "cpu_sequence_sums", &cpu_sequence_sums);
  bind_cpu<void, SequenceSumArgs<double>>(m, "cpu_sequence_sums64", &cpu_sequence_sums);
  bind_cpu<void, SequenceSumArgs<float>>(m, "cpu_sequence_sums_backward", &cpu_sequence_sums_backward);
  bind_cpu<void, SequenceSumArgs<double>>(m, "cpu_sequence_sums_backward64", &cpu_sequence_sums_backward);
  bind_cpu<void, ReturnsArgs<float>>(m, "cpu_returns", &cpu_returns);
  bind_cpu<void, ReturnsArgs<double>>(m, "cpu_returns64", &cpu_returns);
  bind_cpu<int64_t, SegmentedArgs<float>>(m, "cpu_segmented_returns", &cpu_segmented_returns);
  bind_cpu<int64_t, SegmentedArgs<double>>(m, "cpu_segmented_returns64", &cpu_segmented_returns);
  bind_cpu<void, GroupReduceArgs<float>>(m, "cpu_group_reduce", &cpu_group_reduce);
  bind_cpu<void, GroupReduceArgs<double>>(m, "cpu_group_reduce64", &cpu_group_reduce);
  bind_cpu<void, NormalizeArgs<float>>(m, "cpu_group_normalize", &cpu_group_normalize);
  bind_cpu<void, NormalizeArgs<double>>(m, "cpu_group_normalize64", &cpu_group_normalize);
  bind_cpu<void, NormalizeGradArgs<float>>(m, "cpu_group_normalize_backward", &cpu_group_normalize_backward);
  bind_cpu<void, NormalizeGradArgs<double>>(m, "cpu_group_normalize_backward64", &cpu_group_normalize_backward);
  bind_cpu<void, PairArgs<float>>(m, "cpu_level_pairs", &cpu_level_pairs);
  bind_cpu<void, PairArgs<double>>(m, "cpu_level_pairs64", &cpu_level_pairs);
  bind_cpu<void, PairGradArgs<float>>(m, "cpu_level_pairs_backward", &cpu_level_pairs_backward);
  bind_cpu<void, PairGradArgs<double>>(m, "cpu_level_pairs_backward64", &cpu_level_pairs_backward);
  bind_cpu<void, WeightArgs<float>>(m, "cpu_importance_weights", &cpu_importance_weights);
  bind_cpu<void, WeightArgs<double>>(m, "cpu_importance_weights64", &cpu_importance_weights);
  bind_cpu<void, OffPolicyArgs<float>>(m, "cpu_off_policy_mask", &cpu_off_policy_mask);
  bind_cpu<void, OffPolicyArgs<double>>(m, "cpu_off_policy_mask64", &cpu_off_policy_mask);
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
