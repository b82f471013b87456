// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "meta/gru.h"
#include "meta/inner_loss.h"

namespace prefkern {

template <class S> void bind_meta_structs(py::module_& m, const std::string& suffix) {
  using Loss = LpgArgs<S>;
  Struct<Loss> l(m, "LpgArgs" + suffix);
  l.member("rule", &Loss::rule).member("rows", &Loss::rows).member("actions", &Loss::actions).member("width", &Loss::width);
  l.member("probs", &Loss::probs).member("taken", &Loss::taken).member("y", &Loss::y).member("target", &Loss::target);
  l.member("adjustment", &Loss::adjustment).member("sums", &Loss::sums).member("finished", &Loss::finished);
  l.member("out", &Loss::out).member("terms", &Loss::terms).member("upstream", &Loss::upstream);
  l.member("probs_grad", &Loss::probs_grad).member("y_grad", &Loss::y_grad);
  l.member("adjustment_grad", &Loss::adjustment_grad).member("target_grad", &Loss::target_grad);
  l.member("above_probs", &Loss::above_probs).member("above_y", &Loss::above_y);
  l.member("above_adjustment", &Loss::above_adjustment).member("above_target", &Loss::above_target);

  using Gru = GruArgs<S>;
  Struct<Gru> g(m, "GruArgs" + suffix);
  g.member("rows", &Gru::rows).member("steps", &Gru::steps).member("hidden", &Gru::hidden).member("step", &Gru::step);
  g.member("gates", &Gru::gates).member("done", &Gru::done).member("bias", &Gru::bias).member("out", &Gru::out);
  g.member("saved", &Gru::saved).member("product", &Gru::product).member("carry", &Gru::carry);
  g.member("grad_out", &Gru::grad_out).member("grad_gates", &Gru::grad_gates).member("grad_inner", &Gru::grad_inner);
  g.member("before", &Gru::before).member("weight", &Gru::weight).member("weight_transposed", &Gru::weight_transposed);

  using Columns = ColumnSumArgs<S>;
  Struct<Columns> c(m, "ColumnSumArgs" + suffix);
  c.member("rows", &Columns::rows).member("columns", &Columns::columns);
  c.member("values", &Columns::values).member("sums", &Columns::sums);
}

inline void bind_meta(py::module_& m) {
  Struct<LpgRule>(m, "LpgRule").member("alpha", &LpgRule::alpha).member("sign", &LpgRule::sign);
  bind_meta_structs<float>(m, "");
  bind_meta_structs<double>(m, "64");
}

inline void bind_meta_cpu(py::module_& m) {
  bind_cpu<void, LpgArgs<float>>(m, "cpu_lpg_loss", &cpu_lpg_loss);
  bind_cpu<void, LpgArgs<double>>(m, "cpu_lpg_loss64", &cpu_lpg_loss);
  bind_cpu<void, LpgArgs<float>>(m, "cpu_lpg_gradients", &cpu_lpg_gradients);
  bind_cpu<void, LpgArgs<double>>(m, "cpu_lpg_gradients64", &cpu_lpg_gradients);
  bind_cpu<void, LpgArgs<float>>(m, "cpu_lpg_second", &cpu_lpg_second);
  bind_cpu<void, LpgArgs<double>>(m, "cpu_lpg_second64", &cpu_lpg_second);
  bind_cpu<void, GruArgs<float>>(m, "cpu_gru_forward", &cpu_gru_forward);
  bind_cpu<void, GruArgs<double>>(m, "cpu_gru_forward64", &cpu_gru_forward);
  bind_cpu<void, GruArgs<float>>(m, "cpu_gru_backward", &cpu_gru_backward);
  bind_cpu<void, GruArgs<double>>(m, "cpu_gru_backward64", &cpu_gru_backward);
  bind_cpu<void, ColumnSumArgs<float>>(m, "cpu_column_sums", &cpu_column_sums);
  bind_cpu<void, ColumnSumArgs<double>>(m, "cpu_column_sums64", &cpu_column_sums);
}

inline void bind_meta_cuda(py::module_& m) {
  bind_cuda(m, "cuda_lpg_loss", &cuda_lpg_loss);
  bind_cuda(m, "cuda_lpg_gradients", &cuda_lpg_gradients);
  bind_cuda(m, "cuda_lpg_second", &cuda_lpg_second);
  bind_cuda(m, "cuda_gru_forward_step", &cuda_gru_forward_step);
  bind_cuda(m, "cuda_gru_backward_step", &cuda_gru_backward_step);
  bind_cuda(m, "cuda_column_sums", &cuda_column_sums);
}

}  // namespace prefkern
