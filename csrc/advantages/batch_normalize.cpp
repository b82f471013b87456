// batch_moments, merge_moments and batch_normalize: what needs the whole batch, in two phases that a trainer with several
// ranks can put a gather between.
#include <cmath>

#include "advantages/moments.h"
#include "advantages/ops.h"
#include "core/arguments.h"
#include "core/cuda_runtime.h"

namespace prefkern {
namespace {

void check_moments(const Tensor& moments, const Tensor& like, const char* like_name) {
  check_type(moments.scalar_type() == ScalarType::Double, "moments has dtype ", dtype_name(moments.scalar_type()),
             "; accepted: float64");
  check_value(moments.dim() == 1 && moments.size(0) == 3, "moments has shape ", shape_text(moments), "; expected [3]");
  check_same_device(moments, "moments", like, like_name);
}

Tensor widened(const Tensor& t, const char* name) {
  return to_contiguous(cast(t, scalar_type(accumulator(float_dtype(t, name)))));
}

template <class S> void run_moments(const Tensor& v, const OptTensor& mask, const OptTensor& weights, Tensor& out) {
  MomentsArgs<S> a;
  a.count = v.numel();
  a.values = data<S>(v);
  a.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  a.weights = data_or_null<S>(weights);
  a.moments = mutable_data<double>(out);
  if constexpr (sizeof(S) == 4) {
    if (v.is_cuda()) {
      OptTensor parts;
      if (a.count > kMomentsPart) parts = empty({ceil_div(a.count, kMomentsPart), 3}, ScalarType::Double, v);
      a.parts = parts ? mutable_data<double>(*parts) : nullptr;
      return check_cuda(cuda_batch_moments(a, current_stream(v)));
    }
  }
  if (a.weights)
    for (int64_t i = 0; i < a.count; i++)
      check_value(a.weights[i] >= 0 && std::isfinite(a.weights[i]), "weights holds ", a.weights[i], " at element ", i,
                  "; every weight must be finite and not negative");
  cpu_batch_moments(a);
}

template <class S> void run_normalize(const Tensor& v, const OptTensor& mask, const Tensor& moments, MomentsMode mode,
                                      double eps, Tensor& out) {
  BatchNormalizeArgs<S> a;
  a.count = v.numel();
  a.values = data<S>(v);
  a.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  a.moments = data<double>(moments);
  a.mode = mode;
  a.eps = eps;
  a.out = mutable_data<S>(out);
  if constexpr (sizeof(S) == 4) {
    if (v.is_cuda()) return check_cuda(cuda_batch_normalize(a, current_stream(v)));
  }
  check_value(mode != MomentsMode::token || !(a.moments[0] < 2), "moments has n = ", a.moments[0],
              "; mode 'token' needs at least 2 tokens");
  cpu_batch_normalize(a);
}

}  // namespace

Tensor batch_moments(const Tensor& values, const OptTensor& weights) {
  const Tensor v = widened(values, "values");
  OptTensor mask, w;
  if (weights) {
    check_same_device(*weights, "weights", values, "values");
    check_value(same_shape(*weights, values), "weights has shape ", shape_text(*weights), "; values has shape ",
                shape_text(values), ", so the same is expected");
    if (weights->scalar_type() == ScalarType::Bool) {
      mask = to_contiguous(*weights);
    } else {
      float_dtype(*weights, "weights");
      w = to_contiguous(cast(*weights, v.scalar_type()));
    }
  }
  const OnDevice guard(values);
  Tensor out = empty({3}, ScalarType::Double, v);
  if (v.scalar_type() == ScalarType::Double) run_moments<double>(v, mask, w, out);
  else run_moments<float>(v, mask, w, out);
  return out;
}

Tensor merge_moments(const Tensor& moments) {
  check_type(moments.scalar_type() == ScalarType::Double, "moments has dtype ", dtype_name(moments.scalar_type()),
             "; accepted: float64");
  check_value(moments.dim() == 2 && moments.size(1) == 3, "moments has shape ", shape_text(moments), "; expected [R, 3]");
  const OnDevice guard(moments);
  const Tensor parts = to_contiguous(moments);
  const Tensor out = empty({3}, ScalarType::Double, parts);
  const MergeArgs a{parts.size(0), data<double>(parts), mutable_data<double>(out)};
  if (parts.is_cuda()) check_cuda(cuda_merge_moments(a, current_stream(parts)));
  else cpu_merge_moments(a);
  return out;
}

Tensor batch_normalize(const Tensor& values, const Tensor& moments, const OptTensor& mask, int64_t mode, double eps) {
  const Tensor v = widened(values, "values");
  check_moments(moments, values, "values");
  check_value(mode == 0 || mode == 1, "mode is ", mode, "; accepted: 0, 1");
  check_value(eps >= 0 && std::isfinite(eps), "eps is ", eps, "; it must be finite and not negative");
  const OptTensor m = checked_mask(mask, values, "values");
  const OnDevice guard(values);
  Tensor out = torch::stable::empty_like(v);
  const Tensor three = to_contiguous(moments);
  if (v.scalar_type() == ScalarType::Double) run_normalize<double>(v, m, three, static_cast<MomentsMode>(mode), eps, out);
  else run_normalize<float>(v, m, three, static_cast<MomentsMode>(mode), eps, out);
  return out;
}

}  // namespace prefkern
