// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "diffusion/clean_latents.h"
#include "diffusion/pair_errors.h"

namespace prefkern {

template <class S> void bind_diffusion_structs(py::module_& m, const std::string& suffix) {
  using Pairs = DiffusionPairArgs<S>;
  Struct<Pairs> p(m, "DiffusionPairArgs" + suffix);
  p.member("rule", &Pairs::rule).member("reduction", &Pairs::reduction).member("dtype", &Pairs::dtype);
  p.member("pairs", &Pairs::pairs).member("length", &Pairs::length);
  p.member("pred_w", &Pairs::pred_w).member("pred_l", &Pairs::pred_l);
  p.member("target_w", &Pairs::target_w).member("target_l", &Pairs::target_l);
  p.member("ref_w", &Pairs::ref_w).member("ref_l", &Pairs::ref_l);
  p.member("ref_error_w", &Pairs::ref_error_w).member("ref_error_l", &Pairs::ref_error_l).member("weight", &Pairs::weight);
  p.member("sums", &Pairs::sums).member("loss", &Pairs::loss).member("metrics", &Pairs::metrics);
  p.member("slopes", &Pairs::slopes).member("errors", &Pairs::errors).member("finished", &Pairs::finished);

  using Grad = DiffusionGradArgs<S>;
  Struct<Grad> g(m, "DiffusionGradArgs" + suffix);
  g.member("dtype", &Grad::dtype).member("pairs", &Grad::pairs).member("length", &Grad::length);
  g.member("pred_w", &Grad::pred_w).member("pred_l", &Grad::pred_l);
  g.member("target_w", &Grad::target_w).member("target_l", &Grad::target_l);
  g.member("per_pair", &Grad::per_pair).member("share", &Grad::share);
  g.member("slopes", &Grad::slopes).member("upstream", &Grad::upstream);
  g.member("grad_w", &Grad::grad_w).member("grad_l", &Grad::grad_l);

  using Clean = X0LossArgs<S>;
  Struct<Clean> c(m, "X0LossArgs" + suffix);
  c.member("kind", &Clean::kind).member("c", &Clean::c).member("reduction", &Clean::reduction).member("dtype", &Clean::dtype);
  c.member("rows", &Clean::rows).member("length", &Clean::length);
  c.member("pred", &Clean::pred).member("x", &Clean::x).member("target", &Clean::target);
  c.member("coefficients", &Clean::coefficients).member("sums", &Clean::sums).member("loss", &Clean::loss);
  c.member("finished", &Clean::finished);

  using CleanGrad = X0GradArgs<S>;
  Struct<CleanGrad> d(m, "X0GradArgs" + suffix);
  d.member("kind", &CleanGrad::kind).member("c", &CleanGrad::c).member("dtype", &CleanGrad::dtype);
  d.member("rows", &CleanGrad::rows).member("length", &CleanGrad::length);
  d.member("pred", &CleanGrad::pred).member("x", &CleanGrad::x).member("target", &CleanGrad::target);
  d.member("coefficients", &CleanGrad::coefficients).member("per_row", &CleanGrad::per_row);
  d.member("share", &CleanGrad::share).member("upstream", &CleanGrad::upstream).member("grad", &CleanGrad::grad);
}

inline void bind_diffusion(py::module_& m) {
  py::enum_<DiffusionKind>(m, "DiffusionKind")
      .value("sigmoid", DiffusionKind::sigmoid)
      .value("hinge", DiffusionKind::hinge)
      .value("ipo", DiffusionKind::ipo)
      .value("margin", DiffusionKind::margin);
  py::enum_<X0Kind>(m, "X0Kind").value("huber", X0Kind::huber).value("l2", X0Kind::l2);
  py::enum_<LatentReduction>(m, "LatentReduction")
      .value("mean", LatentReduction::mean)
      .value("sum", LatentReduction::sum)
      .value("none", LatentReduction::none);
  Struct<DiffusionRule>(m, "DiffusionRule")
      .member("kind", &DiffusionRule::kind)
      .member("beta", &DiffusionRule::beta)
      .member("factor", &DiffusionRule::factor)
      .member("negative", &DiffusionRule::negative);
  Struct<LatentRows>(m, "LatentRows", "Row b starts b * stride elements after data; its elements are adjacent.")
      .member("data", &LatentRows::data)
      .member("stride", &LatentRows::stride);
  Struct<RowNumbers>(m, "RowNumbers", "One number per row, of float or, if wide, of double.")
      .member("data", &RowNumbers::data)
      .member("wide", &RowNumbers::wide);
  Struct<LatentStepArgs>(m, "LatentStepArgs")
      .member("dtype", &LatentStepArgs::dtype)
      .member("rows", &LatentStepArgs::rows)
      .member("length", &LatentStepArgs::length)
      .member("x", &LatentStepArgs::x)
      .member("e1", &LatentStepArgs::e1)
      .member("e2", &LatentStepArgs::e2)
      .member("coefficients", &LatentStepArgs::coefficients)
      .member("out", &LatentStepArgs::out);
  bind_diffusion_structs<float>(m, "");
  bind_diffusion_structs<double>(m, "64");
}

inline void bind_diffusion_cpu(py::module_& m) {
  bind_cpu<void, DiffusionPairArgs<float>>(m, "cpu_diffusion_pairs", &cpu_diffusion_pairs);
  bind_cpu<void, DiffusionPairArgs<double>>(m, "cpu_diffusion_pairs64", &cpu_diffusion_pairs);
  bind_cpu<void, DiffusionGradArgs<float>>(m, "cpu_diffusion_pairs_backward", &cpu_diffusion_pairs_backward);
  bind_cpu<void, DiffusionGradArgs<double>>(m, "cpu_diffusion_pairs_backward64", &cpu_diffusion_pairs_backward);
  bind_cpu<void, X0LossArgs<float>>(m, "cpu_x0_loss", &cpu_x0_loss);
  bind_cpu<void, X0LossArgs<double>>(m, "cpu_x0_loss64", &cpu_x0_loss);
  bind_cpu<void, X0GradArgs<float>>(m, "cpu_x0_loss_backward", &cpu_x0_loss_backward);
  bind_cpu<void, X0GradArgs<double>>(m, "cpu_x0_loss_backward64", &cpu_x0_loss_backward);
  bind_cpu(m, "cpu_latent_step", &cpu_latent_step);
}

inline void bind_diffusion_cuda(py::module_& m) {
  bind_cuda(m, "cuda_diffusion_pairs", &cuda_diffusion_pairs);
  bind_cuda(m, "cuda_diffusion_pairs_backward", &cuda_diffusion_pairs_backward);
  bind_cuda(m, "cuda_x0_loss", &cuda_x0_loss);
  bind_cuda(m, "cuda_x0_loss_backward", &cuda_x0_loss_backward);
  bind_cuda(m, "cuda_latent_step", &cuda_latent_step);
}

}  // namespace prefkern
