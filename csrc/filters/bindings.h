// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "filters/select.h"

namespace prefkern {

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

inline void bind_filters(py::module_& m) {
  py::enum_<Interpolation>(m, "Interpolation")
      .value("linear", Interpolation::linear)
      .value("lower", Interpolation::lower)
      .value("higher", Interpolation::higher);
  bind_select_structs<float>(m, "");
  bind_select_structs<double>(m, "64");
  m.def("select_workspace", &select_workspace, py::arg("count"), "8-byte words that the selection kernels need on CUDA.");
}

inline void bind_filters_cpu(py::module_& m) {
  bind_cpu<void, SelectArgs<float>>(m, "cpu_quantile", &cpu_quantile);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_quantile64", &cpu_quantile);
  bind_cpu<void, SelectArgs<float>>(m, "cpu_keep_largest", &cpu_keep_largest);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_keep_largest64", &cpu_keep_largest);
  bind_cpu<void, SelectArgs<float>>(m, "cpu_keep_from", &cpu_keep_from);
  bind_cpu<void, SelectArgs<double>>(m, "cpu_keep_from64", &cpu_keep_from);
}

inline void bind_filters_cuda(py::module_& m) {
  bind_cuda(m, "cuda_quantile", &cuda_quantile);
  bind_cuda(m, "cuda_keep_largest", &cuda_keep_largest);
  bind_cuda(m, "cuda_keep_from", &cuda_keep_from);
}

}  // namespace prefkern
