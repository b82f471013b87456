// group_reduce and group_normalize.
#include <cmath>
#include <type_traits>

#include "groups/group_rows.h"
#include "groups/ops.h"

namespace prefkern {

Tensor group_reduce(const Tensor& values, const Tensor& group, OptTensor mask, int64_t reduction) {
  const DType dtype = rows_dtype(values, "values");
  check_value(reduction >= 0 && reduction <= 5, "reduction is ", reduction, "; accepted: 0 to 5");
  const Tensor ids = checked_group(group, values, "values");
  mask = checked_mask(mask, values, "values");
  const OnDevice guard(values);
  const Tensor v = to_contiguous(values), result = torch::stable::empty_like(v);
  const GroupIds groups(ids);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.result)>;
    a.reduction = static_cast<GroupReduction>(reduction);
    a.rows = group_rows(groups, ids.numel());
    a.values = data<S>(v);
    a.mask = data_or_null<uint8_t>(mask);
    a.result = mutable_data<S>(result);
    return a;
  };
  if (dtype == DType::f64) cpu_group_reduce(filled(GroupReduceArgs<double>()));
  else if (v.is_cuda()) check_cuda(cuda_group_reduce(filled(GroupReduceArgs<float>()), current_stream(v)));
  else cpu_group_reduce(filled(GroupReduceArgs<float>()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> group_normalize(const Tensor& x, const Tensor& group, double eps, int64_t ddof,
                                                   bool sigma_grad) {
  const DType dtype = rows_dtype(x, "x");
  check_value(eps >= 0 && std::isfinite(eps), "eps is ", eps, "; it must be finite and not negative");
  check_value(ddof >= 0 && ddof <= 1, "ddof is ", ddof, "; accepted: 0, 1");
  const Tensor ids = checked_group(group, x, "x");
  const OnDevice guard(x);
  const Tensor c = to_contiguous(x);
  const auto make = [&] { return torch::stable::empty_like(c); };
  const std::tuple<Tensor, Tensor, Tensor> out{make(), make(), make()};
  const GroupIds groups(ids);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.z)>;
    a.rule = {eps, ddof, sigma_grad};
    a.rows = group_rows(groups, ids.numel());
    a.x = data<S>(c);
    a.z = mutable_data<S>(std::get<0>(out));
    a.scale = mutable_data<S>(std::get<1>(out));
    a.slope = mutable_data<S>(std::get<2>(out));
    return a;
  };
  if (dtype == DType::f64) cpu_group_normalize(filled(NormalizeArgs<double>()));
  else if (c.is_cuda()) check_cuda(cuda_group_normalize(filled(NormalizeArgs<float>()), current_stream(c)));
  else cpu_group_normalize(filled(NormalizeArgs<float>()));
  return out;
}

Tensor group_normalize_backward(const Tensor& g, const Tensor& group, const Tensor& z, const Tensor& scale,
                                const Tensor& slope) {
  const DType dtype = rows_dtype(z, "z");
  const Tensor ids = checked_group(group, z, "z");
  const OnDevice guard(z);
  const Tensor upstream = checked_rows(g, "g", z, "z"), saved_z = to_contiguous(z);
  const Tensor saved_scale = checked_rows(scale, "scale", z, "z"), saved_slope = checked_rows(slope, "slope", z, "z");
  const Tensor grad = torch::stable::empty_like(saved_z);
  const GroupIds groups(ids);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.grad)>;
    a.rows = group_rows(groups, ids.numel());
    a.upstream = data<S>(upstream);
    a.z = data<S>(saved_z);
    a.scale = data<S>(saved_scale);
    a.slope = data<S>(saved_slope);
    a.grad = mutable_data<S>(grad);
    return a;
  };
  if (dtype == DType::f64) cpu_group_normalize_backward(filled(NormalizeGradArgs<double>()));
  else if (z.is_cuda()) check_cuda(cuda_group_normalize_backward(filled(NormalizeGradArgs<float>()), current_stream(z)));
  else cpu_group_normalize_backward(filled(NormalizeGradArgs<float>()));
  return grad;
}

}  // namespace prefkern
