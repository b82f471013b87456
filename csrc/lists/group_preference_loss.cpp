// group_preference_loss: winners against losers of the same prompt by their means, and its gradient.
#include <cmath>
#include <type_traits>

#include "lists/group_preference.h"
#include "lists/row_tensors.h"

namespace prefkern {

RowOutputs group_preference_loss(const Tensor& scores, const Tensor& is_winner, OptTensor mask, OptTensor norm_tensor,
                                 int64_t ddof, bool scale_variance, int64_t reduction, double beta, double lam, double norm,
                                 bool with_grad) {
  const DType dtype = computed_dtype(scores, "scores");
  check_value(scores.dim() == 2, "scores has shape ", shape_text(scores), "; expected [B, G]");
  check_value(ddof == 0 || ddof == 1, "ddof is ", ddof, "; accepted: 0, 1");
  check_value(beta > 0 && std::isfinite(beta), "beta is ", beta, "; it must be finite and positive");
  check_value(lam >= 0 && std::isfinite(lam), "lam is ", lam, "; it must be finite and not negative");
  const OnDevice guard(scores);
  const Tensor s = to_contiguous(scores);
  check_type(is_winner.scalar_type() == ScalarType::Bool, "is_winner has dtype ", dtype_name(is_winner.scalar_type()),
             "; accepted: bool");
  check_same_device(is_winner, "is_winner", s, "scores");
  check_value(same_shape(is_winner, s), "is_winner has shape ", shape_text(is_winner), "; scores has shape ", shape_text(s),
              ", so the same is expected");
  const Tensor winner = to_contiguous(is_winner);
  mask = checked_mask(mask, s, "scores");
  const int64_t rows = s.size(0), items = s.size(1);
  const RowTensors out(s, norm_tensor, "scores", rows, reduction, norm);
  const Tensor unnormalised = with_grad ? empty({rows, items}, s.scalar_type(), s) : empty({0}, s.scalar_type(), s);
  const auto filled = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.scores)>>;
    a.rule = {beta, lam, ddof, scale_variance};
    a.items = items;
    a.scores = data<S>(s);
    a.winner = data<uint8_t>(winner);
    a.mask = data_or_null<uint8_t>(mask);
    if (with_grad) a.unnormalised = mutable_data<S>(unnormalised);
    out.fill(a.out);
    return a;
  };
  if (dtype == DType::f64) cpu_group_preference(filled(GroupPreferenceArgs<double>()));
  else if (s.is_cuda()) check_cuda(cuda_group_preference(filled(GroupPreferenceArgs<float>()), current_stream(s)));
  else cpu_group_preference(filled(GroupPreferenceArgs<float>()));
  return {out.result(), out.metrics, unnormalised, out.inverse};
}

}  // namespace prefkern
