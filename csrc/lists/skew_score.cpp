// skew_score, alone or with its loss, and skew_row_means.
#include <cmath>
#include <type_traits>

#include "lists/row_tensors.h"
#include "lists/skew.h"

namespace prefkern {
namespace {

void check_tau(double tau) { check_value(tau > 0 && std::isfinite(tau), "tau is ", tau, "; it must be finite and positive"); }

void check_width(const Tensor& v, const char* name) {
  const int64_t width = v.size(v.dim() - 1);
  check_value(width > 0 && width % 2 == 0, name, " has embeddings of ", width, " numbers; an even number is expected");
}

// Of the type and on the device of `like`, of this shape.
OptTensor checked_rows(const OptTensor& t, const char* name, const Tensor& like, const char* like_name, int64_t rows,
                       int64_t columns) {
  if (!t) return t;
  float_dtype(*t, name);
  check_same_device(*t, name, like, like_name);
  const bool vector = columns < 0;
  const bool fits = vector ? t->dim() == 1 && t->size(0) == rows : t->dim() == 2 && t->size(0) == rows && t->size(1) == columns;
  if (vector) check_value(fits, name, " has shape ", shape_text(*t), "; expected [", rows, "]");
  else check_value(fits, name, " has shape ", shape_text(*t), "; expected [", rows, ", ", columns, "]");
  return to_contiguous(cast(*t, like.scalar_type()));
}

}  // namespace

SkewOutputs skew_score(const Tensor& v_i, const Tensor& v_j, OptTensor scales, OptTensor margin, OptTensor norm_tensor,
                       bool normalize, bool with_loss, int64_t reduction, double tau, double norm, int64_t needs) {
  const DType dtype = computed_dtype(v_i, "v_i");
  check_value(v_i.dim() == 2, "v_i has shape ", shape_text(v_i), "; expected [B, 2k]");
  check_width(v_i, "v_i");
  check_type(v_j.scalar_type() == v_i.scalar_type(), "v_j has dtype ", dtype_name(v_j.scalar_type()), "; that of v_i, ",
             dtype_name(v_i.scalar_type()), ", is expected");
  check_tau(tau);
  check_value(with_loss || reduction == int64_t(RowReduction::none), "reduction is ", reduction, "; scores are not reduced");
  const OnDevice guard(v_i);
  const Tensor x = to_contiguous(v_i), y = checked_tokens(v_j, "v_j", x, "v_i", x.scalar_type());
  const int64_t rows = x.size(0), width = x.size(1);
  scales = checked_rows(scales, "scales", x, "v_i", rows, width / 2);
  margin = checked_rows(margin, "margin", x, "v_i", rows, -1);
  const RowTensors out(x, norm_tensor, "v_i", rows, reduction, norm);
  const auto grad = [&](int64_t bit, int64_t columns) {
    return needs & bit ? empty({rows, columns}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
  };
  const Tensor left = grad(kNeedsLeft, width), right = grad(kNeedsRight, width);
  const Tensor of_scales = grad(scales ? int64_t(kNeedsScales) : 0, width / 2);
  const auto filled = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.left)>>;
    a.rule = {tau, normalize, with_loss};
    a.width = width;
    a.left = data<S>(x);
    a.right = data<S>(y);
    a.scales = data_or_null<S>(scales);
    a.margin = data_or_null<S>(margin);
    if (needs & kNeedsLeft) a.left_grad = mutable_data<S>(left);
    if (needs & kNeedsRight) a.right_grad = mutable_data<S>(right);
    if (needs & kNeedsScales && scales) a.scales_grad = mutable_data<S>(of_scales);
    out.fill(a.out);
    return a;
  };
  if (dtype == DType::f64) cpu_skew(filled(SkewArgs<double>()));
  else if (x.is_cuda()) check_cuda(cuda_skew(filled(SkewArgs<float>()), current_stream(x)));
  else cpu_skew(filled(SkewArgs<float>()));
  return {out.result(), out.metrics, left, right, of_scales, out.inverse};
}

Tensor skew_row_means(const Tensor& v, OptTensor mask, OptTensor scales, bool normalize, double tau) {
  const DType dtype = computed_dtype(v, "v");
  check_value(v.dim() == 3, "v has shape ", shape_text(v), "; expected [B, K, 2k]");
  check_width(v, "v");
  check_tau(tau);
  const OnDevice guard(v);
  const Tensor x = to_contiguous(v);
  const int64_t lists = x.size(0), items = x.size(1), width = x.size(2);
  const Tensor means = empty({lists, items}, x.scalar_type(), x);
  if (mask) {
    check_type(mask->scalar_type() == ScalarType::Bool, "mask has dtype ", dtype_name(mask->scalar_type()), "; accepted: bool");
    check_same_device(*mask, "mask", x, "v");
    check_value(same_shape(*mask, means), "mask has shape ", shape_text(*mask), "; expected [", lists, ", ", items, "]");
    mask = to_contiguous(*mask);
  }
  scales = checked_rows(scales, "scales", x, "v", lists, width / 2);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.means)>;
    a.rule = {tau, normalize, false};
    a.lists = lists;
    a.items = items;
    a.width = width;
    a.embeddings = data<S>(x);
    a.scales = data_or_null<S>(scales);
    a.mask = data_or_null<uint8_t>(mask);
    a.means = mutable_data<S>(means);
    return a;
  };
  if (dtype == DType::f64) {
    cpu_skew_means(filled(SkewMeansArgs<double>()));
  } else if (x.is_cuda()) {
    const Tensor scratch = empty({lists * width}, ScalarType::Float, x);
    SkewMeansArgs<float> a = filled(SkewMeansArgs<float>());
    a.scratch = mutable_data<float>(scratch);
    check_cuda(cuda_skew_means(a, current_stream(x)));
  } else {
    cpu_skew_means(filled(SkewMeansArgs<float>()));
  }
  return means;
}

}  // namespace prefkern
