#include "logprobs/linear_head.h"

#include <cmath>

namespace prefkern {

void check_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias) {
  check_value(hidden.dim() == 2, "hidden has shape ", shape_text(hidden), "; expected [N, H]");
  check_value(weight.dim() == 2, "weight has shape ", shape_text(weight), "; expected [V, H]");
  float_dtype(hidden, "hidden");
  float_dtype(weight, "weight");
  check_same_device(weight, "weight", hidden, "hidden");
  check_type(hidden.scalar_type() == weight.scalar_type(), "hidden has dtype ", dtype_name(hidden.scalar_type()),
             " and weight ", dtype_name(weight.scalar_type()), "; they must be equal");
  check_value(hidden.size(1) == weight.size(1), "hidden has H = ", hidden.size(1), " and weight has H = ", weight.size(1),
              "; they must be equal");
  check_value(hidden.size(1) > 0, "hidden has H = 0; at least 1 is expected");
  check_value(weight.size(0) > 0, "weight has V = 0; a vocabulary needs at least one token");
  if (bias) {
    float_dtype(*bias, "bias");
    check_same_device(*bias, "bias", hidden, "hidden");
    check_value(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias has shape ", shape_text(*bias), "; expected [",
                weight.size(0), "]");
  }
}

void check_extras(const Tensor& hidden, const Tensor& weight, const HeadExtras& extras) {
  const int64_t to = extras.logits_dtype;
  check_value(to >= 0 && to <= 2, "logits_dtype is ", to, "; accepted: 0 (float32), 1 (bfloat16), 2 (float16)");
  check_type(to == 0 || hidden.scalar_type() != ScalarType::Double, "logits_dtype is ", to == 1 ? "bfloat16" : "float16",
             "; with float64 hidden, None and float32 are accepted");
  check_value(extras.lora_a.has_value() == extras.lora_b.has_value(), "lora needs both a and b");
  if (!extras.lora_a) return;
  const Tensor &a = *extras.lora_a, &b = *extras.lora_b;
  const auto check = [&](const Tensor& t, const char* name) {
    float_dtype(t, name);
    check_same_device(t, name, hidden, "hidden");
    check_type(t.scalar_type() == hidden.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()), " and hidden ",
               dtype_name(hidden.scalar_type()), "; they must be equal");
  };
  check(a, "lora's a");
  check(b, "lora's b");
  check_value(a.dim() == 2 && a.size(1) == hidden.size(1), "lora's a has shape ", shape_text(a), "; expected [r, ",
              hidden.size(1), "]");
  check_value(a.size(0) > 0, "lora's a has r = 0; at least 1 is expected");
  check_value(b.dim() == 2 && b.size(0) == weight.size(0) && b.size(1) == a.size(0), "lora's b has shape ", shape_text(b),
              "; expected [", weight.size(0), ", ", a.size(0), "]");
  check_value(std::isfinite(extras.lora_scale), "lora's scale is ", extras.lora_scale, "; it must be finite");
}

namespace {
// As a GEMM takes it: adjacent columns, rows that do not overlap (expand() gives them a stride of 0).
Tensor gemm_layout(const Tensor& t) {
  const bool columns = t.size(1) == 1 || t.stride(1) == 1, rows = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  return columns && rows ? t : torch::stable::contiguous(t);
}
}  // namespace

Head make_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
               const OptTensor& row_temperature, const HeadOptions& options, const HeadExtras& extras) {
  const DType dtype = float_dtype(hidden, "hidden"), acc = accumulator(dtype);
  Head h{gemm_layout(hidden),
         gemm_layout(weight),
         targets,
         bias,
         row_temperature,
         options,
         dtype,
         acc,
         hidden.size(0),
         hidden.size(1),
         weight.size(0),
         hidden.is_cuda(),
         current_stream(hidden),
         {}};
  h.logits = acc;
  if (extras.logits_dtype != 0) {
    h.rounded = DType(extras.logits_dtype);
    // One GEMM makes the logits, and cuBLAS can round what it writes to the type of its factors.
    if (h.cuda && *h.rounded == dtype && !bias && !extras.lora_a) h.logits = dtype;
  }
  if (extras.lora_a) h.lora = Lora{gemm_layout(*extras.lora_a), gemm_layout(*extras.lora_b), extras.lora_scale};
  if (bias) h.bias = to_contiguous(cast(*bias, scalar_type(acc)));
  return h;
}

}  // namespace prefkern
