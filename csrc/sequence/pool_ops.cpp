// step_pool: means over the tokens of each step, padded or packed, of numbers or of hidden states, and their gradient.
#include <algorithm>
#include <type_traits>

#include "core/arguments.h"
#include "sequence/ops.h"
#include "sequence/pooling.h"

namespace prefkern {
namespace {

// Which step each token belongs to, checked and contiguous: a bool mask (of one step), or ids as int64.
struct StepIds {
  const char* name;
  Tensor ids;
  OptTensor cu_seqlens;
  SequenceLayout layout;

  StepIds(const Tensor& steps, const OptTensor& cu, int64_t n_steps) : ids(steps) {
    const ScalarType st = steps.scalar_type();
    const bool mask = st == ScalarType::Bool;
    name = mask ? "mask" : "step_ids";
    check_type(mask || st == ScalarType::Long || st == ScalarType::Int, name, " has dtype ", dtype_name(st),
               "; accepted: int64, int32, and bool for one step");
    check_value(n_steps > 0, "n_steps is ", n_steps, "; it must be positive");
    check_value(!mask || n_steps == 1, "n_steps is ", n_steps, "; a mask has one step");
    ids = to_contiguous(mask ? steps : cast(steps, ScalarType::Long));
    if (cu) cu_seqlens = to_contiguous(*cu);
    layout = checked_layout(ids, name, cu_seqlens);
    check_value(layout.sequences > 0 || layout.tokens == 0, "cu_seqlens has no sequence; ", name, " has ", layout.tokens,
                " tokens");
  }
  bool is_mask() const { return ids.scalar_type() == ScalarType::Bool; }
};

void check_ids(const StepIds& steps, int64_t n_steps, bool clamp) {
  if (steps.is_mask()) return;
  const int64_t* ids = data<int64_t>(steps.ids);
  for (int64_t i = 0; i < steps.layout.tokens; i++)
    check_value(pooled_step(ids[i], n_steps, clamp) != kRefusedStep, "step_ids[", i, "] of the flattened tokens is ", ids[i],
                "; accepted: 0 (no step) to n_steps = ", n_steps, clamp ? ", and above" : "");
}

template <class S> PoolArgs<S> pool_args(const StepIds& steps, int64_t n_steps, int64_t features, bool clamp, DType dtype) {
  PoolArgs<S> a;
  a.layout = steps.layout;
  a.features = features;
  a.steps = n_steps;
  a.clamp = clamp;
  a.dtype = dtype;
  steps.is_mask() ? void(a.mask = data<uint8_t>(steps.ids)) : void(a.ids = data<int64_t>(steps.ids));
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> step_pool(const Tensor& values, const Tensor& step_ids, OptTensor cu_seqlens, int64_t n_steps,
                                     bool clamp) {
  const char* name = step_ids.scalar_type() == ScalarType::Bool ? "hidden" : "values";
  const DType dtype = float_dtype(values, name);
  const OnDevice guard(values);
  const StepIds steps(step_ids, cu_seqlens, n_steps);
  check_same_device(step_ids, steps.name, values, name);
  const int64_t dims = steps.ids.dim();
  const bool hidden = values.dim() == dims + 1;
  bool fits = hidden || values.dim() == dims;
  for (int64_t i = 0; fits && i < dims; i++) fits = values.size(i) == steps.ids.size(i);
  check_value(fits, name, " has shape ", shape_text(values), "; ", steps.name, " has shape ", shape_text(steps.ids),
              ", so that shape is expected, or that with features behind it");
  if (values.is_cpu()) check_ids(steps, n_steps, clamp);

  const int64_t features = hidden ? values.size(dims) : 1;
  const Tensor v = hidden && features > 1 && values.stride(dims) != 1 ? to_contiguous(values) : values;
  const ScalarType st = scalar_type(accumulator(dtype));
  const int64_t rows = steps.layout.sequences;
  const Tensor means = hidden ? empty({rows, n_steps, features}, st, values) : empty({rows, n_steps}, st, values);
  const Tensor counts = empty({rows, n_steps}, ScalarType::Long, values);
  const auto fill = [&](auto& a) {
    using S = std::remove_pointer_t<decltype(a.means)>;
    a.rows = dims == 2 ? RowMap{std::max<int64_t>(1, v.size(1)), v.stride(0), v.stride(1)}
                       : RowMap{std::max<int64_t>(1, v.size(0)), 0, v.stride(0)};
    a.values = v.const_data_ptr();
    a.means = mutable_data<S>(means);
    a.counts = mutable_data<int64_t>(counts);
  };
  if (dtype == DType::f64) {
    auto a = pool_args<double>(steps, n_steps, features, clamp, dtype);
    fill(a);
    cpu_pool(a);
  } else {
    auto a = pool_args<float>(steps, n_steps, features, clamp, dtype);
    fill(a);
    values.is_cuda() ? check_cuda(cuda_pool(a, current_stream(values))) : cpu_pool(a);
  }
  return {means, counts};
}

Tensor step_pool_backward(const Tensor& g, const Tensor& counts, const Tensor& step_ids, OptTensor cu_seqlens, bool clamp,
                          int64_t dtype_id) {
  check_value(dtype_id >= 0 && dtype_id <= 3, "dtype is ", dtype_id, "; accepted: 0 to 3");
  const auto dtype = static_cast<DType>(dtype_id);
  const OnDevice guard(g);
  check_type(counts.scalar_type() == ScalarType::Long, "counts has dtype ", dtype_name(counts.scalar_type()),
             "; accepted: int64");
  check_value(counts.dim() == 2, "counts has shape ", shape_text(counts), "; expected [B, n_steps]");
  const int64_t n_steps = counts.size(1);
  const StepIds steps(step_ids, cu_seqlens, n_steps);
  check_same_device(step_ids, steps.name, g, "g");
  check_same_device(counts, "counts", g, "g");
  const ScalarType st = scalar_type(accumulator(dtype));
  check_type(g.scalar_type() == st, "g has dtype ", dtype_name(g.scalar_type()), "; ", dtype_name(st), " is expected");
  const bool hidden = g.dim() == 3;
  check_value((hidden || g.dim() == 2) && g.size(0) == steps.layout.sequences && g.size(1) == n_steps &&
                  counts.size(0) == steps.layout.sequences,
              "g has shape ", shape_text(g), "; expected [", steps.layout.sequences, ", ", n_steps,
              "], or that with features behind it");
  if (g.is_cpu()) check_ids(steps, n_steps, clamp);
  const int64_t features = hidden ? g.size(2) : 1, tokens = steps.layout.tokens;
  const Tensor upstream = to_contiguous(g), n = to_contiguous(counts);
  const ScalarType out = scalar_type(dtype);
  const Tensor grad = steps.ids.dim() == 1 ? (hidden ? empty({tokens, features}, out, g) : empty({tokens}, out, g))
                                           : (hidden ? empty({steps.ids.size(0), steps.ids.size(1), features}, out, g)
                                                     : empty({steps.ids.size(0), steps.ids.size(1)}, out, g));
  const auto fill = [&](auto& a) {
    using S = std::remove_pointer_t<decltype(a.means)>;
    a.counts = const_cast<int64_t*>(data<int64_t>(n));
    a.upstream = data<S>(upstream);
    a.grad = grad.mutable_data_ptr();
  };
  if (dtype == DType::f64) {
    auto a = pool_args<double>(steps, n_steps, features, clamp, dtype);
    fill(a);
    cpu_pool_backward(a);
  } else {
    auto a = pool_args<float>(steps, n_steps, features, clamp, dtype);
    fill(a);
    g.is_cuda() ? check_cuda(cuda_pool_backward(a, current_stream(g))) : cpu_pool_backward(a);
  }
  return grad;
}

}  // namespace prefkern
