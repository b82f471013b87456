// The argument structs and launchers of this room for Python.
#pragma once
#include "core/bindings.h"
#include "gaussian/chol.h"
#include "gaussian/gp_posterior.h"

namespace prefkern {

inline void bind_gaussian(py::module_& m) {
  py::enum_<GpKernel>(m, "GpKernel")
      .value("rbf", GpKernel::rbf)
      .value("matern12", GpKernel::matern12)
      .value("matern32", GpKernel::matern32)
      .value("matern52", GpKernel::matern52);
  Struct<GpPosteriorArgs> p(m, "GpPosteriorArgs");
  p.member("kernel", &GpPosteriorArgs::kernel).member("variance", &GpPosteriorArgs::variance);
  p.member("points", &GpPosteriorArgs::points).member("dims", &GpPosteriorArgs::dims);
  p.member("candidates", &GpPosteriorArgs::candidates).member("stride", &GpPosteriorArgs::stride);
  p.member("length_step", &GpPosteriorArgs::length_step).member("factor", &GpPosteriorArgs::factor);
  p.member("weights", &GpPosteriorArgs::weights).member("unique", &GpPosteriorArgs::unique);
  p.member("inputs", &GpPosteriorArgs::inputs).member("inverse_length", &GpPosteriorArgs::inverse_length);
  p.member("counts", &GpPosteriorArgs::counts).member("mean", &GpPosteriorArgs::mean).member("var", &GpPosteriorArgs::var);
  Struct<CholArgs> c(m, "CholArgs");
  c.member("size", &CholArgs::size).member("stride", &CholArgs::stride).member("factor", &CholArgs::factor);
  c.member("vector", &CholArgs::vector).member("sigma", &CholArgs::sigma).member("pivot", &CholArgs::pivot);
}

inline void bind_gaussian_cpu(py::module_& m) {
  bind_cpu<void, GpPosteriorArgs>(m, "cpu_gp_posterior", &cpu_gp_posterior);
  bind_cpu<void, CholArgs>(m, "cpu_chol_append", &cpu_chol_append);
  bind_cpu<void, CholArgs>(m, "cpu_chol_rank1", &cpu_chol_rank1);
}

inline void bind_gaussian_cuda(py::module_& m) {
  bind_cuda(m, "cuda_gp_posterior", &cuda_gp_posterior);
  bind_cuda(m, "cuda_chol_append", &cuda_chol_append);
  bind_cuda(m, "cuda_chol_rank1", &cuda_chol_rank1);
}

}  // namespace prefkern
