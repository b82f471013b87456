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

std::optional<KeptTokens> checked_keep(const HeadExtras& extras, const Tensor& hidden, const Tensor& targets, int64_t vocab,
                                       int64_t ignore_index) {
  check_value(extras.keep_offsets.has_value() == extras.keep_ids.has_value(), "keep needs both offsets and ids");
  if (!extras.keep_offsets) return std::nullopt;
  const Tensor &offsets = *extras.keep_offsets, &ids = *extras.keep_ids;
  const int64_t rows = targets.size(0);
  check_same_device(offsets, "keep's offsets", hidden, "hidden");
  check_same_device(ids, "keep's ids", hidden, "hidden");
  check_type(offsets.scalar_type() == ScalarType::Long, "keep's offsets has dtype ", dtype_name(offsets.scalar_type()),
             "; accepted: int64");
  check_type(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, "keep's ids has dtype ",
             dtype_name(ids.scalar_type()), "; accepted: int64, int32");
  check_value(offsets.dim() == 1 && offsets.size(0) == rows + 1, "keep's offsets has shape ", shape_text(offsets), "; with ",
              rows, " rows, [", rows + 1, "] is expected");
  check_value(ids.dim() == 1, "keep's ids has shape ", shape_text(ids), "; a vector is expected");
  Tensor own = to_contiguous(offsets);
  const KeptTokens keep{torch::stable::narrow(own, 0, 0, rows), torch::stable::narrow(own, 0, 1, rows), to_contiguous(ids)};
  if (!hidden.is_cpu()) return keep;

  const int64_t* o = data<int64_t>(own);
  const int64_t count = ids.numel();
  check_value(o[0] == 0, "keep's offsets[0] is ", o[0], "; it must be 0");
  check_value(o[rows] == count, "keep's offsets end at ", o[rows], "; they must end at the ", count, " of keep's ids");
  for (int64_t row = 0; row < rows; row++)
    check_value(o[row] <= o[row + 1], "keep's offsets[", row + 1, "] is ", o[row + 1], " after ", o[row],
                "; offsets must not descend");
  const int64_t* t = data<int64_t>(targets);
  const auto look = [&](const auto* id) {
    for (int64_t row = 0; row < rows; row++) {
      if (t[row] == ignore_index) continue;
      check_value(o[row] < o[row + 1], "keep holds no ids for row ", row, "; only ignored rows may keep none");
      for (int64_t i = o[row]; i < o[row + 1]; i++) {
        check_value(id[i] >= 0 && id[i] < vocab, "keep's ids[", i, "] is ", id[i], " in row ", row, "; accepted: 0 to ",
                    vocab - 1);
        check_value(i == o[row] || id[i - 1] < id[i], "keep's ids[", i, "] is ", id[i], " after ", id[i - 1], " in row ", row,
                    "; ids of a row must ascend, none twice");
      }
    }
  };
  keep.ids.scalar_type() == ScalarType::Long ? look(data<int64_t>(keep.ids)) : look(data<int32_t>(keep.ids));
  return keep;
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
