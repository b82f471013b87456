// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "sequence/pooling.h"
#include "sequence/returns.h"
#include "sequence/sequence_sums.h"

namespace prefkern {

template <class S> void bind_sequence_structs(py::module_& m, const std::string& suffix) {
  using Sum = SequenceSumArgs<S>;
  Struct<Sum> s(m, "SequenceSumArgs" + suffix);
  s.member("transform", &Sum::transform).member("mean", &Sum::mean).member("layout", &Sum::layout).member("place", &Sum::place);
  s.member("values", &Sum::values);
  s.member("minus", &Sum::minus);
  s.member("weights", &Sum::weights);
  s.member("mask", &Sum::mask);
  s.member("starts", &Sum::starts).member("ends", &Sum::ends).member("head", &Sum::head);
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

  using Pool = PoolArgs<S>;
  Struct<Pool> p(m, "PoolArgs" + suffix);
  p.member("layout", &Pool::layout).member("features", &Pool::features).member("steps", &Pool::steps);
  p.member("clamp", &Pool::clamp).member("dtype", &Pool::dtype).member("rows", &Pool::rows);
  p.member("values", &Pool::values);
  p.member("ids", &Pool::ids);
  p.member("mask", &Pool::mask);
  p.member("means", &Pool::means);
  p.member("counts", &Pool::counts);
  p.member("upstream", &Pool::upstream);
  p.member("grad", &Pool::grad);

  using Segmented = SegmentedArgs<S>;
  Struct<Segmented> g(m, "SegmentedArgs" + suffix);
  g.member("gamma", &Segmented::gamma).member("count", &Segmented::count);
  g.member("rewards", &Segmented::rewards);
  g.member("segment", &Segmented::segment);
  g.member("place", &Segmented::place);
  g.member("rows", &Segmented::rows);
  g.member("returns", &Segmented::returns);
}

inline void bind_sequence(py::module_& m) {
  py::enum_<TokenTransform>(m, "TokenTransform").value("none", TokenTransform::none).value("exp", TokenTransform::exp);
  py::enum_<Bootstrap>(m, "Bootstrap")
      .value("repeat", Bootstrap::repeat)
      .value("critic", Bootstrap::critic)
      .value("zero", Bootstrap::zero);
  Struct<ReturnsRule>(m, "ReturnsRule")
      .member("bootstrap", &ReturnsRule::bootstrap)
      .member("gamma", &ReturnsRule::gamma)
      .member("decay", &ReturnsRule::decay);
  Struct<PlaceRule>(m, "PlaceRule").member("tail", &PlaceRule::tail).member("decay", &PlaceRule::decay);
  bind_sequence_structs<float>(m, "");
  bind_sequence_structs<double>(m, "64");
}

inline void bind_sequence_cpu(py::module_& m) {
  bind_cpu<void, SequenceSumArgs<float>>(m, "cpu_sequence_sums", &cpu_sequence_sums);
  bind_cpu<void, SequenceSumArgs<double>>(m, "cpu_sequence_sums64", &cpu_sequence_sums);
  bind_cpu<void, SequenceSumArgs<float>>(m, "cpu_sequence_sums_backward", &cpu_sequence_sums_backward);
  bind_cpu<void, SequenceSumArgs<double>>(m, "cpu_sequence_sums_backward64", &cpu_sequence_sums_backward);
  bind_cpu<void, PoolArgs<float>>(m, "cpu_pool", &cpu_pool);
  bind_cpu<void, PoolArgs<double>>(m, "cpu_pool64", &cpu_pool);
  bind_cpu<void, PoolArgs<float>>(m, "cpu_pool_backward", &cpu_pool_backward);
  bind_cpu<void, PoolArgs<double>>(m, "cpu_pool_backward64", &cpu_pool_backward);
  bind_cpu<void, ReturnsArgs<float>>(m, "cpu_returns", &cpu_returns);
  bind_cpu<void, ReturnsArgs<double>>(m, "cpu_returns64", &cpu_returns);
  bind_cpu<int64_t, SegmentedArgs<float>>(m, "cpu_segmented_returns", &cpu_segmented_returns);
  bind_cpu<int64_t, SegmentedArgs<double>>(m, "cpu_segmented_returns64", &cpu_segmented_returns);
}

inline void bind_sequence_cuda(py::module_& m) {
  bind_cuda(m, "cuda_sequence_sums", &cuda_sequence_sums);
  bind_cuda(m, "cuda_sequence_sums_backward", &cuda_sequence_sums_backward);
  bind_cuda(m, "cuda_pool", &cuda_pool);
  bind_cuda(m, "cuda_pool_backward", &cuda_pool_backward);
  bind_cuda(m, "cuda_returns", &cuda_returns);
  bind_cuda(m, "cuda_segmented_returns", &cuda_segmented_returns);
}

}  // namespace prefkern
