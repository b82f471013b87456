// level_pairs: the loss over all pairs of a group whose levels differ, and its gradient.
#include <cmath>
#include <type_traits>

#include "groups/group_rows.h"
#include "groups/ops.h"
#include "groups/pair_walk.h"

namespace prefkern {

std::tuple<Tensor, Tensor, Tensor> level_pairs(const Tensor& scores, const Tensor& group, const Tensor& levels, double beta,
                                               double anisotropy, bool per_response, bool with_grad) {
  const DType dtype = rows_dtype(scores, "scores");
  check_value(std::isfinite(beta), "beta is ", beta, "; it must be finite");
  check_value(std::isfinite(anisotropy), "anisotropy is ", anisotropy, "; it must be finite");
  const Tensor ids = checked_group(group, scores, "scores"), lv = checked_ids(levels, "levels", scores, "scores");
  if (lv.is_cpu())
    for (int64_t i = 0; i < lv.size(0); i++)
      check_value(data<int64_t>(lv)[i] >= 1, "levels[", i, "] is ", data<int64_t>(lv)[i], "; levels begin at 1, the best");
  const OnDevice guard(scores);
  const Tensor h = to_contiguous(scores);
  const int64_t count = h.size(0);
  const bool nothing = count == 0;  // no block would write the results
  const ScalarType st = h.scalar_type();
  const std::tuple<Tensor, Tensor, Tensor> out{nothing ? zeros({}, st, h) : empty({}, st, h),
                                               nothing ? zeros({}, ScalarType::Long, h) : empty({}, ScalarType::Long, h),
                                               empty({with_grad ? count : 0}, st, h)};
  if (nothing) return out;
  const GroupIds groups(ids);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.loss)>;
    a.rule = {beta, anisotropy, per_response};
    a.rows = group_rows(groups, ids.numel());
    a.scores = data<S>(h);
    a.levels = data<int64_t>(lv);
    a.loss = mutable_data<S>(std::get<0>(out));
    a.pairs = mutable_data<int64_t>(std::get<1>(out));
    if (with_grad) a.unnormalised = mutable_data<S>(std::get<2>(out));
    return a;
  };
  if (dtype == DType::f64) {
    cpu_level_pairs(filled(PairArgs<double>()));
  } else if (h.is_cuda()) {
    const Tensor scratch = zeros({2 * count + 1}, ScalarType::Double, h);
    PairArgs<float> a = filled(PairArgs<float>());
    a.partials = mutable_data<double>(scratch);
    a.finished = reinterpret_cast<uint32_t*>(a.partials + 2 * count);
    check_cuda(cuda_level_pairs(a, current_stream(h)));
  } else {
    cpu_level_pairs(filled(PairArgs<float>()));
  }
  return out;
}

Tensor level_pairs_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& pairs) {
  const DType dtype = rows_dtype(unnormalised, "unnormalised");
  check_type(g_loss.scalar_type() == unnormalised.scalar_type() && pairs.scalar_type() == ScalarType::Long,
             "g_loss and pairs have dtypes ", dtype_name(g_loss.scalar_type()), " and ", dtype_name(pairs.scalar_type()),
             "; expected ", dtype_name(unnormalised.scalar_type()), " and int64");
  check_value(g_loss.numel() == 1 && pairs.numel() == 1, "g_loss and pairs have shapes ", shape_text(g_loss), " and ",
              shape_text(pairs), "; expected one element each");
  check_same_device(g_loss, "g_loss", unnormalised, "unnormalised");
  check_same_device(pairs, "pairs", unnormalised, "unnormalised");
  const OnDevice guard(unnormalised);
  const Tensor u = to_contiguous(unnormalised), grad = torch::stable::empty_like(u);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.grad)>;
    a.count = u.size(0);
    a.unnormalised = data<S>(u);
    a.upstream = data<S>(g_loss);
    a.pairs = data<int64_t>(pairs);
    a.grad = mutable_data<S>(grad);
    return a;
  };
  if (dtype == DType::f64) cpu_level_pairs_backward(filled(PairGradArgs<double>()));
  else if (u.is_cuda()) check_cuda(cuda_level_pairs_backward(filled(PairGradArgs<float>()), current_stream(u)));
  else cpu_level_pairs_backward(filled(PairGradArgs<float>()));
  return grad;
}

}  // namespace prefkern
