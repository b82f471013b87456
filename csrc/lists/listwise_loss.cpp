// listwise_loss: the loss of lists of scored items, and its gradient.
#include <cmath>
#include <type_traits>

#include "lists/listwise.h"
#include "lists/row_tensors.h"

namespace prefkern {
namespace {

void check_rule(const ListRule& r, int64_t kind, int64_t gain, int64_t rank) {
  check_value(kind >= 0 && kind < kListKinds, "kind is ", kind, "; accepted: 0 to ", kListKinds - 1);
  check_value(gain >= 0 && gain <= 1, "gain is ", gain, "; accepted: 0, 1");
  check_value(rank >= 0 && rank <= 1, "rank is ", rank, "; accepted: 0, 1");
  check_value(!r.per_pair || list_of_pairs(r.kind), "normalize is 'pairs', but the loss has no pairs; accepted: 'sum'");
  check_value(r.beta > 0 && std::isfinite(r.beta), "beta is ", r.beta, "; it must be finite and positive");
  check_value(r.temperature > 0 && std::isfinite(r.temperature), "label_temperature is ", r.temperature,
              "; it must be finite and positive");
  check_value(r.smoothing < 1, "label_smoothing is ", r.smoothing, "; it must be below 1");
  check_value(r.kind != ListKind::exo || r.smoothing != 0, "label_smoothing is 0; kind 'exo' takes the logarithm of it");
}

// NaN inside a mask is no order.
template <class S> void check_labels(const ListRule& rule, const Tensor& labels, const OptTensor& mask, int64_t items) {
  const S* v = data<S>(labels);
  const uint8_t* keep = data_or_null<uint8_t>(mask);
  for (int64_t i = 0, n = labels.numel(); i < n; i++)
    check_value((keep && !keep[i]) || label_valid(rule, double(v[i])), "labels[", i / items, ", ", i % items, "] is ", v[i],
                list_has_gain(rule) ? "; gain 'exp2' takes finite labels up to 30: scale them, or take gain 'linear'"
                                    : "; every label that counts must be finite");
}

}  // namespace

RowOutputs listwise_loss(const Tensor& scores, OptTensor labels, OptTensor mask, OptTensor norm_tensor, int64_t kind,
                         int64_t gain, int64_t rank, bool per_pair, int64_t reduction, double beta, double temperature,
                         double smoothing, double norm, bool with_grad) {
  const DType dtype = computed_dtype(scores, "scores");
  check_value(scores.dim() == 2, "scores has shape ", shape_text(scores), "; expected [B, K]");
  const ListRule rule{ListKind(kind), ListGain(gain), ListRank(rank), per_pair, beta, temperature, smoothing};
  check_rule(rule, kind, gain, rank);
  const int64_t rows = scores.size(0), items = scores.size(1);
  check_value(labels.has_value() || rule.kind == ListKind::plackett_luce,
              "labels is None; only kind 'plackett_luce' takes the order of the items instead");
  const OnDevice guard(scores);
  const Tensor s = to_contiguous(scores);
  mask = checked_mask(mask, s, "scores");
  if (labels) {
    check_type(labels->scalar_type() != ScalarType::Bool, "labels has dtype bool; numbers are expected");
    check_same_device(*labels, "labels", s, "scores");
    check_value(same_shape(*labels, s), "labels has shape ", shape_text(*labels), "; scores has shape ", shape_text(s),
                ", so the same is expected");
    labels = to_contiguous(cast(*labels, s.scalar_type()));
    if (s.is_cpu())
      dtype == DType::f64 ? check_labels<double>(rule, *labels, mask, items) : check_labels<float>(rule, *labels, mask, items);
  }
  const RowTensors out(s, norm_tensor, "scores", rows, reduction, norm);
  const Tensor unnormalised = with_grad ? empty({rows, items}, s.scalar_type(), s) : empty({0}, s.scalar_type(), s);
  const auto filled = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.scores)>>;
    a.rule = rule;
    a.items = items;
    a.scores = data<S>(s);
    a.labels = data_or_null<S>(labels);
    a.mask = data_or_null<uint8_t>(mask);
    if (with_grad) a.unnormalised = mutable_data<S>(unnormalised);
    out.fill(a.out);
    return a;
  };
  if (dtype == DType::f64) {
    cpu_listwise(filled(ListArgs<double>()));
  } else if (s.is_cuda()) {
    ListArgs<float> a = filled(ListArgs<float>());
    const bool needs_scratch = rule.kind == ListKind::plackett_luce || rule.kind == ListKind::lambda;
    const Tensor scratch = empty({needs_scratch ? rows * items * 3 : 0}, ScalarType::Float, s);
    a.scratch = mutable_data<float>(scratch);
    check_cuda(cuda_listwise(a, current_stream(s)));
  } else {
    cpu_listwise(filled(ListArgs<float>()));
  }
  return {out.result(), out.metrics, unnormalised, out.inverse};
}

Tensor preference_rows_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse) {
  const DType dtype = computed_dtype(unnormalised, "unnormalised");
  check_type(g_loss.scalar_type() == unnormalised.scalar_type() && inverse.scalar_type() == unnormalised.scalar_type(),
             "g_loss and inverse have dtypes ", dtype_name(g_loss.scalar_type()), " and ", dtype_name(inverse.scalar_type()),
             "; expected ", dtype_name(unnormalised.scalar_type()));
  check_value(unnormalised.dim() == 2, "unnormalised has shape ", shape_text(unnormalised), "; expected [rows, columns]");
  const int64_t rows = unnormalised.size(0);
  check_value((g_loss.dim() == 0 || (g_loss.dim() == 1 && g_loss.size(0) == rows)) && inverse.numel() == 1,
              "g_loss and inverse have shapes ", shape_text(g_loss), " and ", shape_text(inverse), "; expected [] or [", rows,
              "], and one element");
  check_same_device(g_loss, "g_loss", unnormalised, "unnormalised");
  check_same_device(inverse, "inverse", unnormalised, "unnormalised");
  const OnDevice guard(unnormalised);
  const Tensor u = to_contiguous(unnormalised), g = to_contiguous(g_loss), grad = torch::stable::empty_like(u);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.grad)>;
    a.rows = rows;
    a.columns = u.size(1);
    a.per_row = g.dim() == 1;
    a.unnormalised = data<S>(u);
    a.upstream = data<S>(g);
    a.inverse = data<S>(inverse);
    a.grad = mutable_data<S>(grad);
    return a;
  };
  if (dtype == DType::f64) cpu_row_gradient(filled(RowGradArgs<double>()));
  else if (u.is_cuda()) check_cuda(cuda_row_gradient(filled(RowGradArgs<float>()), current_stream(u)));
  else cpu_row_gradient(filled(RowGradArgs<float>()));
  return grad;
}

}  // namespace prefkern
