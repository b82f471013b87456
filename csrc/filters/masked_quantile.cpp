// masked_quantile and top_quantile_mask: a quantile of all values that count, and which of them are the largest.
#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "filters/ops.h"
#include "filters/select.h"

namespace prefkern {
namespace {

// Values and mask as the kernels take them; alive while they run.
struct Input {
  Tensor values;
  OptTensor mask;
  Input(const Tensor& v, const OptTensor& m)
      : values(to_contiguous(cast(v, scalar_type(accumulator(float_dtype(v, "values")))))),
        mask(checked_mask(m, v, "values")) {}

  bool wide() const { return values.scalar_type() == ScalarType::Double; }
  template <class S> SelectArgs<S> args() const {
    SelectArgs<S> a;
    a.count = values.numel();
    a.values = data<S>(values);
    a.mask = data_or_null<uint8_t>(mask);
    return a;
  }
};

Tensor workspace(const Tensor& values) {
  return zeros({values.is_cuda() ? select_workspace(values.numel()) : 0}, ScalarType::Long, values);
}

template <class S> void find_quantile(const Input& in, double q, Interpolation interpolation, const Tensor& out) {
  SelectArgs<S> a = in.args<S>();
  a.q = q;
  a.interpolation = interpolation;
  a.quantile = mutable_data<S>(out);
  if constexpr (sizeof(S) == 4) {
    if (in.values.is_cuda()) {
      const Tensor scratch = workspace(in.values);
      a.workspace = mutable_data<int64_t>(scratch);
      return check_cuda(cuda_quantile(a, current_stream(out)));
    }
  }
  cpu_quantile(a);
}

template <class S> void keep(const Input& in, double fraction, bool exactly, const Tensor& out) {
  SelectArgs<S> a = in.args<S>();
  a.keep = mutable_data<uint8_t>(out);
  a.fraction = fraction;
  Tensor threshold;
  if (!exactly) {
    threshold = empty({}, in.values.scalar_type(), in.values);
    find_quantile<S>(in, 1 - fraction, Interpolation::linear, threshold);
    a.quantile = mutable_data<S>(threshold);
  }
  if constexpr (sizeof(S) == 4) {
    if (in.values.is_cuda()) {
      void* stream = current_stream(out);
      if (!exactly) return check_cuda(cuda_keep_from(a, stream));
      const Tensor scratch = workspace(in.values);
      a.workspace = mutable_data<int64_t>(scratch);
      return check_cuda(cuda_keep_largest(a, stream));
    }
  }
  exactly ? cpu_keep_largest(a) : cpu_keep_from(a);
}

}  // namespace

Tensor masked_quantile(const Tensor& values, OptTensor mask, double q, int64_t interpolation) {
  check_value(q >= 0 && q <= 1, "q is ", q, "; it must lie in [0, 1]");
  check_value(interpolation >= 0 && interpolation <= 2, "interpolation is ", interpolation, "; accepted: 0 to 2");
  const OnDevice guard(values);
  const Input in(values, mask);
  const Tensor out = empty({}, in.values.scalar_type(), in.values);
  const auto between = static_cast<Interpolation>(interpolation);
  in.wide() ? find_quantile<double>(in, q, between, out) : find_quantile<float>(in, q, between, out);
  return out;
}

Tensor top_quantile_mask(const Tensor& values, OptTensor mask, double fraction, int64_t rule) {
  check_value(fraction >= 0 && fraction <= 1, "fraction is ", fraction, "; it must lie in [0, 1]");
  check_value(rule >= 0 && rule <= 1, "rule is ", rule, "; accepted: 0, 1");
  const OnDevice guard(values);
  const Input in(values, mask);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < values.dim(); d++) shape.push_back(values.size(d));
  const Tensor out = torch::stable::new_empty(in.values, {shape.data(), shape.size()}, ScalarType::Bool);
  in.wide() ? keep<double>(in, fraction, rule == 0, out) : keep<float>(in, fraction, rule == 0, out);
  return out;
}

}  // namespace prefkern
