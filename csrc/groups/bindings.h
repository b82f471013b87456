// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "groups/group_folds.h"
#include "groups/pair_walk.h"

namespace prefkern {

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

inline void bind_groups(py::module_& m) {
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
}

inline void bind_groups_cpu(py::module_& m) {
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
}

inline void bind_groups_cuda(py::module_& m) {
  bind_cuda(m, "cuda_group_reduce", &cuda_group_reduce);
  bind_cuda(m, "cuda_group_normalize", &cuda_group_normalize);
  bind_cuda(m, "cuda_group_normalize_backward", &cuda_group_normalize_backward);
  bind_cuda(m, "cuda_level_pairs", &cuda_level_pairs);
  bind_cuda(m, "cuda_level_pairs_backward", &cuda_level_pairs_backward);
}

}  // namespace prefkern
