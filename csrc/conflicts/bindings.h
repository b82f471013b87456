// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

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
  bind_cpu<void, ConflictWeightArgs<float>>(m, "cpu_conflict_weights", &cpu_conflict_weights);
  bind_cpu<void, ConflictWeightArgs<double>>(m, "cpu_conflict_weights64", &cpu_conflict_weights);
}

inline void bind_conflicts_cuda(py::module_& m) {
  bind_cuda<ConflictArgs<int64_t>>(m, "cuda_conflict_runs", &cuda_conflict_runs);
  bind_cuda<ConflictArgs<int32_t>>(m, "cuda_conflict_runs32", &cuda_conflict_runs);
  bind_cuda(m, "cuda_conflict_weights", &cuda_conflict_weights);
}

}  // namespace prefkern
