// The argument structs and launchers of this room for Python.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "advantages/group_stats.h"
#include "advantages/masked_pairs.h"
#include "advantages/moments.h"
#include "advantages/question_weights.h"
#include "core/bindings.h"

namespace prefkern {

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

inline void bind_advantages(py::module_& m) {
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
}

inline void bind_advantages_cpu(py::module_& m) {
  bind_cpu<GroupFault, GroupArgs<float>>(m, "cpu_group_advantages", &cpu_group_advantages);
  bind_cpu<GroupFault, GroupArgs<double>>(m, "cpu_group_advantages64", &cpu_group_advantages);
  bind_cpu<void, MomentsArgs<float>>(m, "cpu_batch_moments", &cpu_batch_moments);
  bind_cpu<void, MomentsArgs<double>>(m, "cpu_batch_moments64", &cpu_batch_moments);
  bind_cpu<void, MergeArgs>(m, "cpu_merge_moments", &cpu_merge_moments);
  bind_cpu<void, BatchNormalizeArgs<float>>(m, "cpu_batch_normalize", &cpu_batch_normalize);
  bind_cpu<void, BatchNormalizeArgs<double>>(m, "cpu_batch_normalize64", &cpu_batch_normalize);
  bind_cpu<bool, QuestionArgs<float>>(m, "cpu_question_weights", &cpu_question_weights);
  bind_cpu<bool, QuestionArgs<double>>(m, "cpu_question_weights64", &cpu_question_weights);
  bind_cpu<void, MaskedPairArgs<float>>(m, "cpu_masked_pairs", &cpu_masked_pairs);
  bind_cpu<void, MaskedPairArgs<double>>(m, "cpu_masked_pairs64", &cpu_masked_pairs);
}

inline void bind_advantages_cuda(py::module_& m) {
  bind_cuda(m, "cuda_group_advantages", &cuda_group_advantages);
  bind_cuda(m, "cuda_batch_moments", &cuda_batch_moments);
  bind_cuda(m, "cuda_merge_moments", &cuda_merge_moments);
  bind_cuda(m, "cuda_batch_normalize", &cuda_batch_normalize);
  bind_cuda(m, "cuda_question_weights", &cuda_question_weights);
  bind_cuda(m, "cuda_masked_pairs", &cuda_masked_pairs);
}

}  // namespace prefkern
