// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "sampling/seeded_normal.h"

namespace prefkern {

template <class S> void bind_normal_structs(py::module_& m, const std::string& suffix) {
  using Args = NormalArgs<S>;
  Struct<Args> s(m, "NormalArgs" + suffix);
  s.member("seed", &Args::seed)
      .member("first_row", &Args::first_row)
      .member("rows", &Args::rows)
      .member("scale", &Args::scale)
      .member("first_element", &Args::first_element)
      .member("count", &Args::count)
      .member("dtype", &Args::dtype);
  s.member("weights", &Args::weights);
  s.member("add_to", &Args::add_to);
  s.member("out", &Args::out);
}

inline void bind_sampling(py::module_& m) {
  bind_normal_structs<float>(m, "");
  bind_normal_structs<double>(m, "64");
  Struct<PhiloxArgs> p(m, "PhiloxArgs");
  p.member("seed", &PhiloxArgs::seed)
      .member("row", &PhiloxArgs::row)
      .member("first_block", &PhiloxArgs::first_block)
      .member("blocks", &PhiloxArgs::blocks);
  p.member("words", &PhiloxArgs::words);
}

inline void bind_sampling_cpu(py::module_& m) {
  bind_cpu<void, NormalArgs<float>>(m, "cpu_seeded_normal", &cpu_seeded_normal);
  bind_cpu<void, NormalArgs<double>>(m, "cpu_seeded_normal64", &cpu_seeded_normal);
  bind_cpu<void, PhiloxArgs>(m, "cpu_philox_words", &cpu_philox_words);
}

inline void bind_sampling_cuda(py::module_& m) {
  bind_cuda(m, "cuda_seeded_normal", &cuda_seeded_normal);
  bind_cuda(m, "cuda_philox_words", &cuda_philox_words);
}

}  // namespace prefkern
