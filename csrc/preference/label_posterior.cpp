// label_posterior: how likely each label is right. Constants in, a constant out.
#include <type_traits>

#include "core/arguments.h"
#include "preference/ops.h"
#include "preference/posterior.h"

namespace prefkern {

Tensor label_posterior(const Tensor& margin, const Tensor& reliability, OptTensor annotator) {
  const DType dtype = float_dtype(margin, "margin");
  check_type(dtype == accumulator(dtype), "margin has dtype ", dtype_name(margin.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  check_value(margin.dim() == 1, "margin has shape ", shape_text(margin), "; expected [P]");
  float_dtype(reliability, "reliability");
  check_same_device(reliability, "reliability", margin, "margin");
  check_value(reliability.numel() > 0 && reliability.dim() <= 1, "reliability has shape ", shape_text(reliability),
              "; expected [K], one per annotator, or one element");
  check_value(annotator || reliability.numel() == 1, "annotator is None; the ids of ", reliability.numel(),
              " annotators are expected");
  const OnDevice guard(margin);
  const Tensor d = to_contiguous(margin), eta = to_contiguous(cast(reliability, margin.scalar_type()));
  OptTensor ids;
  if (annotator) ids = checked_ids(*annotator, "annotator", margin, "margin");
  const int64_t count = eta.numel();
  const Tensor result = torch::stable::empty_like(d);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.posterior)>;
    a.pairs = d.size(0);
    a.annotators = count;
    a.margin = data<S>(d);
    a.reliability = data<S>(eta);
    a.annotator = data_or_null<int64_t>(ids);
    a.posterior = mutable_data<S>(result);
    if (!d.is_cpu()) return a;
    for (int64_t k = 0; k < count; k++)
      check_value(a.reliability[k] >= 0 && a.reliability[k] <= 1, "reliability[", k, "] is ", a.reliability[k],
                  "; it must be between 0 and 1");
    for (int64_t i = 0; ids && i < a.pairs; i++)
      check_value(a.annotator[i] >= 0 && a.annotator[i] < count, "annotator[", i, "] is ", a.annotator[i], "; ids are 0 to ",
                  count - 1);
    return a;
  };
  if (dtype == DType::f64) cpu_label_posterior(filled(PosteriorArgs<double>()));
  else if (d.is_cuda()) check_cuda(cuda_label_posterior(filled(PosteriorArgs<float>()), current_stream(d)));
  else cpu_label_posterior(filled(PosteriorArgs<float>()));
  return result;
}

}  // namespace prefkern
