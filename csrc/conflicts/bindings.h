// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "conflicts/divergence.h"
#include "conflicts/runs.h"
#include "core/bindings.h"

namespace prefkern {

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

  using Pair = DivergenceArgs<T>;
  Struct<Pair> d(m, "DivergenceArgs" + suffix);
  d.member("layout_a", &Pair::layout_a).member("layout_b", &Pair::layout_b);
  d.member("ids_a", &Pair::ids_a).member("ids_b", &Pair::ids_b);
  d.member("mask_a", &Pair::mask_a).member("mask_b", &Pair::mask_b);
  d.member("position", &Pair::position);
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

inline void bind_conflicts(py::module_& m) {
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
}

inline void bind_conflicts_cpu(py::module_& m) {
  bind_cpu<int64_t, ConflictArgs<int64_t>>(m, "cpu_conflict_runs", &cpu_conflict_runs);
  bind_cpu<int64_t, ConflictArgs<int32_t>>(m, "cpu_conflict_runs32", &cpu_conflict_runs);
  bind_cpu<int64_t, DivergenceArgs<int64_t>>(m, "cpu_first_divergence", &cpu_first_divergence);
  bind_cpu<int64_t, DivergenceArgs<int32_t>>(m, "cpu_first_divergence32", &cpu_first_divergence);
  bind_cpu<void, ConflictWeightArgs<float>>(m, "cpu_conflict_weights", &cpu_conflict_weights);
  bind_cpu<void, ConflictWeightArgs<double>>(m, "cpu_conflict_weights64", &cpu_conflict_weights);
}

inline void bind_conflicts_cuda(py::module_& m) {
  bind_cuda<ConflictArgs<int64_t>>(m, "cuda_conflict_runs", &cuda_conflict_runs);
  bind_cuda<ConflictArgs<int32_t>>(m, "cuda_conflict_runs32", &cuda_conflict_runs);
  bind_cuda(m, "cuda_conflict_weights", &cuda_conflict_weights);
  bind_cuda<DivergenceArgs<int64_t>>(m, "cuda_first_divergence", &cuda_first_divergence);
  bind_cuda<DivergenceArgs<int32_t>>(m, "cuda_first_divergence32", &cuda_first_divergence);
}

}  // namespace prefkern
