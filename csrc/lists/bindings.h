// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "lists/group_preference.h"
#include "lists/listwise.h"
#include "lists/row_loss.h"
#include "lists/skew.h"

namespace prefkern {

template <class S> void bind_list_structs(py::module_& m, const std::string& suffix) {
  using Rows = RowLoss<S>;
  Struct<Rows> r(m, "RowLoss" + suffix);
  r.member("rows", &Rows::rows).member("reduction", &Rows::reduction).member("norm", &Rows::norm);
  r.member("norm_tensor", &Rows::norm_tensor).member("sums", &Rows::sums).member("losses", &Rows::losses);
  r.member("loss", &Rows::loss).member("metrics", &Rows::metrics).member("inverse", &Rows::inverse);
  r.member("finished", &Rows::finished);

  using Grad = RowGradArgs<S>;
  Struct<Grad> g(m, "RowGradArgs" + suffix);
  g.member("rows", &Grad::rows).member("columns", &Grad::columns).member("per_row", &Grad::per_row);
  g.member("unnormalised", &Grad::unnormalised).member("upstream", &Grad::upstream).member("inverse", &Grad::inverse);
  g.member("grad", &Grad::grad);

  using Lists = ListArgs<S>;
  Struct<Lists> l(m, "ListArgs" + suffix);
  l.member("rule", &Lists::rule).member("items", &Lists::items).member("scores", &Lists::scores);
  l.member("labels", &Lists::labels).member("mask", &Lists::mask).member("unnormalised", &Lists::unnormalised);
  l.member("out", &Lists::out).member("scratch", &Lists::scratch);

  using Group = GroupPreferenceArgs<S>;
  Struct<Group> p(m, "GroupPreferenceArgs" + suffix);
  p.member("rule", &Group::rule).member("items", &Group::items).member("scores", &Group::scores);
  p.member("winner", &Group::winner).member("mask", &Group::mask).member("unnormalised", &Group::unnormalised);
  p.member("out", &Group::out);

  using Skew = SkewArgs<S>;
  Struct<Skew> s(m, "SkewArgs" + suffix);
  s.member("rule", &Skew::rule).member("width", &Skew::width).member("left", &Skew::left).member("right", &Skew::right);
  s.member("scales", &Skew::scales).member("margin", &Skew::margin).member("left_grad", &Skew::left_grad);
  s.member("right_grad", &Skew::right_grad).member("scales_grad", &Skew::scales_grad).member("out", &Skew::out);

  using Means = SkewMeansArgs<S>;
  Struct<Means> n(m, "SkewMeansArgs" + suffix);
  n.member("rule", &Means::rule).member("lists", &Means::lists).member("items", &Means::items);
  n.member("width", &Means::width).member("embeddings", &Means::embeddings).member("scales", &Means::scales);
  n.member("mask", &Means::mask).member("means", &Means::means).member("scratch", &Means::scratch);
}

inline void bind_lists(py::module_& m) {
  py::enum_<RowReduction>(m, "RowReduction")
      .value("mean", RowReduction::mean)
      .value("sum", RowReduction::sum)
      .value("none", RowReduction::none);
  py::enum_<ListKind>(m, "ListKind")
      .value("plackett_luce", ListKind::plackett_luce)
      .value("lambda", ListKind::lambda)
      .value("uniform", ListKind::uniform)
      .value("exo", ListKind::exo)
      .value("infonca", ListKind::infonca)
      .value("nca", ListKind::nca)
      .value("rrhf", ListKind::rrhf)
      .value("lire", ListKind::lire);
  py::enum_<ListGain>(m, "ListGain").value("exp2", ListGain::exp2).value("linear", ListGain::linear);
  py::enum_<ListRank>(m, "ListRank").value("labels", ListRank::labels).value("scores", ListRank::scores);
  Struct<ListRule>(m, "ListRule")
      .member("kind", &ListRule::kind)
      .member("gain", &ListRule::gain)
      .member("rank", &ListRule::rank)
      .member("per_pair", &ListRule::per_pair)
      .member("beta", &ListRule::beta)
      .member("temperature", &ListRule::temperature)
      .member("smoothing", &ListRule::smoothing);
  Struct<GroupPreferenceRule>(m, "GroupPreferenceRule")
      .member("beta", &GroupPreferenceRule::beta)
      .member("lam", &GroupPreferenceRule::lam)
      .member("ddof", &GroupPreferenceRule::ddof)
      .member("scale_variance", &GroupPreferenceRule::scale_variance);
  Struct<SkewRule>(m, "SkewRule")
      .member("tau", &SkewRule::tau)
      .member("normalize", &SkewRule::normalize)
      .member("with_loss", &SkewRule::with_loss);
  bind_list_structs<float>(m, "");
  bind_list_structs<double>(m, "64");
}

inline void bind_lists_cpu(py::module_& m) {
  bind_cpu<void, ListArgs<float>>(m, "cpu_listwise", &cpu_listwise);
  bind_cpu<void, ListArgs<double>>(m, "cpu_listwise64", &cpu_listwise);
  bind_cpu<void, GroupPreferenceArgs<float>>(m, "cpu_group_preference", &cpu_group_preference);
  bind_cpu<void, GroupPreferenceArgs<double>>(m, "cpu_group_preference64", &cpu_group_preference);
  bind_cpu<void, SkewArgs<float>>(m, "cpu_skew", &cpu_skew);
  bind_cpu<void, SkewArgs<double>>(m, "cpu_skew64", &cpu_skew);
  bind_cpu<void, SkewMeansArgs<float>>(m, "cpu_skew_means", &cpu_skew_means);
  bind_cpu<void, SkewMeansArgs<double>>(m, "cpu_skew_means64", &cpu_skew_means);
  bind_cpu<void, RowGradArgs<float>>(m, "cpu_row_gradient", &cpu_row_gradient);
  bind_cpu<void, RowGradArgs<double>>(m, "cpu_row_gradient64", &cpu_row_gradient);
}

inline void bind_lists_cuda(py::module_& m) {
  bind_cuda(m, "cuda_listwise", &cuda_listwise);
  bind_cuda(m, "cuda_group_preference", &cuda_group_preference);
  bind_cuda(m, "cuda_skew", &cuda_skew);
  bind_cuda(m, "cuda_skew_means", &cuda_skew_means);
  bind_cuda(m, "cuda_row_gradient", &cuda_row_gradient);
}

}  // namespace prefkern
