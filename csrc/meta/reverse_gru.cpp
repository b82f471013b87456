// reverse_gru and its backward: a scan over steps, and the weights' gradients as products over all steps at once.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/cuda_runtime.h"
#include "core/gemm.h"
#include "meta/checks.h"
#include "meta/gru.h"
#include "meta/ops.h"

namespace prefkern {
namespace {

OptTensor checked_done(const OptTensor& done, const Tensor& gates) {
  if (!done) return done;
  check_type(done->scalar_type() == ScalarType::Bool, "done has dtype ", dtype_name(done->scalar_type()), "; accepted: bool");
  check_same_device(*done, "done", gates, "x");
  check_value(done->dim() == 2 && done->size(0) == gates.size(0) && done->size(1) == gates.size(1), "done has shape ",
              shape_text(*done), "; expected [", gates.size(0), ", ", gates.size(1), "], one per step");
  return to_contiguous(*done);
}

void check_weight(const Tensor& weight, int64_t hidden, const Tensor& like) {
  check_type(weight.scalar_type() == like.scalar_type(), "weight_hh has dtype ", dtype_name(weight.scalar_type()),
             "; the gates have dtype ", dtype_name(like.scalar_type()), ", so the same is expected");
  check_same_device(weight, "weight_hh", like, "x");
  check_value(weight.dim() == 2 && weight.size(0) == 3 * hidden && weight.size(1) == hidden, "weight_hh has shape ",
              shape_text(weight), "; expected [", 3 * hidden, ", ", hidden, "]");
}

template <class S> std::vector<S> transposed(const S* weight, int64_t hidden) {
  std::vector<S> t(3 * hidden * hidden);
  for (int64_t row = 0; row < 3 * hidden; row++)
    for (int64_t k = 0; k < hidden; k++) t[k * 3 * hidden + row] = weight[row * hidden + k];
  return t;
}

template <class S> constexpr DType type_of() { return std::is_same_v<S, double> ? DType::f64 : DType::f32; }

}  // namespace

std::tuple<Tensor, Tensor> reverse_gru(const Tensor& gates, OptTensor done, const Tensor& weight, const Tensor& bias,
                                       bool with_grad) {
  const DType dtype = computed_type(gates, "x");
  check_value(gates.dim() == 3 && gates.size(2) > 0 && gates.size(2) % 3 == 0, "gates has shape ", shape_text(gates),
              "; expected [B, T, 3H]");
  const int64_t rows = gates.size(0), steps = gates.size(1), hidden = gates.size(2) / 3;
  check_weight(weight, hidden, gates);
  check_value(bias.dim() == 1 && bias.size(0) == hidden, "bias_n has shape ", shape_text(bias), "; expected [", hidden, "]");
  const OnDevice guard(gates);
  const Tensor g = to_contiguous(gates), w = to_contiguous(weight), b = alike(bias, "bias_n", bias, "weight_hh", weight);
  done = checked_done(done, gates);
  const ScalarType st = gates.scalar_type();
  const Tensor out = empty({rows, steps, hidden}, st, gates);
  const Tensor saved = with_grad ? empty({rows, steps, 4 * hidden}, st, gates) : empty({0}, st, gates);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    a.rows = rows;
    a.steps = steps;
    a.hidden = hidden;
    a.gates = data<S>(g);
    a.done = data_or_null<uint8_t>(done);
    a.bias = data<S>(b);
    a.out = mutable_data<S>(out);
    if (with_grad) a.saved = mutable_data<S>(saved);
    return a;
  };
  const auto run = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    const std::vector<S> t = transposed(data<S>(w), hidden);
    a.weight_transposed = t.data();
    cpu_gru_forward(a);
  };
  if (dtype == DType::f64) {
    run(filled(GruArgs<double>()));
  } else if (gates.is_cpu()) {
    run(filled(GruArgs<float>()));
  } else {
    GruArgs<float> a = filled(GruArgs<float>());
    const Tensor product = zeros({rows, 3 * hidden}, st, gates), carry = zeros({rows, hidden}, st, gates);
    a.product = mutable_data<float>(product);
    a.carry = mutable_data<float>(carry);
    for (a.step = steps - 1; a.step >= 0; a.step--) {
      if (a.step + 1 < steps)
        gemm(gates, DType::f32, rows, 3 * hidden, hidden, {a.carry, hidden, false}, {data<float>(w), hidden, true}, a.product,
             DType::f32, 3 * hidden, false);
      check_cuda(cuda_gru_forward_step(a, current_stream(gates)));
    }
  }
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor> reverse_gru_backward(const Tensor& grad, const Tensor& states, const Tensor& saved,
                                                        OptTensor done, const Tensor& weight, bool needs_weights) {
  const DType dtype = computed_type(states, "states");
  check_value(states.dim() == 3, "states has shape ", shape_text(states), "; expected [B, T, H]");
  const int64_t rows = states.size(0), steps = states.size(1), hidden = states.size(2), tokens = rows * steps;
  check_weight(weight, hidden, states);
  check_value(saved.dim() == 3 && saved.size(0) == rows && saved.size(1) == steps && saved.size(2) == 4 * hidden,
              "saved has shape ", shape_text(saved), "; expected [", rows, ", ", steps, ", ", 4 * hidden, "]");
  const OnDevice guard(states);
  const ScalarType st = states.scalar_type();
  const Tensor g = alike(grad, "grad", states, "states", states), h = to_contiguous(states);
  const Tensor s = alike(saved, "saved", saved, "states", states), w = to_contiguous(weight);
  done = checked_done(done, states);
  const Tensor grad_gates = empty({rows, steps, 3 * hidden}, st, states);
  const Tensor inner = empty({rows, steps, hidden}, st, states), before = empty({rows, steps, hidden}, st, states);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    a.rows = rows;
    a.steps = steps;
    a.hidden = hidden;
    a.done = data_or_null<uint8_t>(done);
    a.out = const_cast<S*>(data<S>(h));
    a.saved = const_cast<S*>(data<S>(s));
    a.grad_out = data<S>(g);
    a.grad_gates = mutable_data<S>(grad_gates);
    a.grad_inner = mutable_data<S>(inner);
    a.before = mutable_data<S>(before);
    a.weight = data<S>(w);
    return a;
  };
  if (dtype == DType::f64) {
    cpu_gru_backward(filled(GruArgs<double>()));
  } else if (states.is_cpu()) {
    cpu_gru_backward(filled(GruArgs<float>()));
  } else {
    GruArgs<float> a = filled(GruArgs<float>());
    const Tensor product = zeros({rows, hidden}, st, states), carry = zeros({rows, hidden}, st, states);
    a.product = mutable_data<float>(product);
    a.carry = mutable_data<float>(carry);
    for (a.step = 0; a.step < steps; a.step++) {
      check_cuda(cuda_gru_backward_step(a, current_stream(states)));
      if (a.step + 1 == steps) break;
      gemm(states, DType::f32, rows, hidden, 2 * hidden, {a.grad_gates + a.step * 3 * hidden, steps * 3 * hidden, false},
           {a.weight, hidden, false}, a.product, DType::f32, hidden, false);
      gemm(states, DType::f32, rows, hidden, hidden, {a.grad_inner + a.step * hidden, steps * hidden, false},
           {a.weight + 2 * hidden * hidden, hidden, false}, a.product, DType::f32, hidden, true);
    }
  }
  if (!needs_weights) return {grad_gates, empty({0}, st, states), empty({0}, st, states)};

  const bool any = tokens > 0;  // without tokens nothing below writes
  const Tensor grad_weight = any ? empty({3 * hidden, hidden}, st, states) : zeros({3 * hidden, hidden}, st, states);
  const Tensor grad_bias = any ? empty({hidden}, st, states) : zeros({hidden}, st, states);
  const auto weights = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.values)>>;
    S* to = mutable_data<S>(grad_weight);
    const S *gates = data<S>(grad_gates), *by_inner = data<S>(inner), *states_before = data<S>(before);
    const DType type = type_of<S>();
    gemm(states, type, 2 * hidden, hidden, tokens, {gates, 3 * hidden, true}, {states_before, hidden, false}, to, type, hidden,
         false);
    gemm(states, type, hidden, hidden, tokens, {by_inner, hidden, true}, {states_before, hidden, false},
         to + 2 * hidden * hidden, type, hidden, false);
    a.rows = tokens;
    a.columns = hidden;
    a.values = by_inner;
    a.sums = mutable_data<S>(grad_bias);
    return a;
  };
  if (!any) return {grad_gates, grad_weight, grad_bias};
  if (dtype == DType::f64) cpu_column_sums(weights(ColumnSumArgs<double>()));
  else if (states.is_cpu()) cpu_column_sums(weights(ColumnSumArgs<float>()));
  else check_cuda(cuda_column_sums(weights(ColumnSumArgs<float>()), current_stream(states)));
  return {grad_gates, grad_weight, grad_bias};
}

}  // namespace prefkern
