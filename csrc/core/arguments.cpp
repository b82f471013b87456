#include "core/arguments.h"

#include <array>

#include "core/groups.h"

namespace prefkern {

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

SequenceLayout checked_layout(const Tensor& tokens, const char* name, const OptTensor& cu_seqlens, const char* cu_name) {
  if (!cu_seqlens) {
    check_value(tokens.dim() == 2, name, " has shape ", shape_text(tokens), "; expected [B, T], or [N] with ", cu_name);
    return {tokens.size(0), tokens.size(1), tokens.numel(), nullptr};
  }
  check_value(tokens.dim() == 1, name, " has shape ", shape_text(tokens), "; with ", cu_name, " [N] is expected");
  check_type(cu_seqlens->scalar_type() == ScalarType::Int, cu_name, " has dtype ", dtype_name(cu_seqlens->scalar_type()),
             "; accepted: int32");
  check_value(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0, cu_name, " has shape ", shape_text(*cu_seqlens),
              "; expected [B + 1]");
  check_same_device(*cu_seqlens, cu_name, tokens, name);
  const SequenceLayout layout{cu_seqlens->size(0) - 1, 0, tokens.numel(), data<int32_t>(*cu_seqlens)};
  if (tokens.is_cpu()) {
    const int32_t* c = layout.cu_seqlens;
    check_value(c[0] == 0, cu_name, "[0] is ", c[0], "; it must be 0");
    for (int64_t b = 0; b < layout.sequences; b++)
      check_value(c[b] <= c[b + 1], cu_name, "[", b + 1, "] is ", c[b + 1], " after ", c[b], "; it must not descend");
    check_value(c[layout.sequences] == layout.tokens, cu_name, " ends at ", c[layout.sequences], "; ", name, " has ",
                layout.tokens, " tokens, so that is expected");
  }
  return layout;
}

Tensor checked_tokens(const Tensor& t, const char* name, const Tensor& tokens, const char* tokens_name, ScalarType type) {
  float_dtype(t, name);
  check_same_device(t, name, tokens, tokens_name);
  check_value(same_shape(t, tokens), name, " has shape ", shape_text(t), "; ", tokens_name, " has shape ", shape_text(tokens),
              ", so the same is expected");
  return to_contiguous(cast(t, type));
}

OptTensor checked_mask(const OptTensor& mask, const Tensor& tokens, const char* tokens_name, const char* name) {
  if (!mask) return mask;
  check_type(mask->scalar_type() == ScalarType::Bool, name, " has dtype ", dtype_name(mask->scalar_type()), "; accepted: bool");
  check_same_device(*mask, name, tokens, tokens_name);
  check_value(same_shape(*mask, tokens), name, " has shape ", shape_text(*mask), "; ", tokens_name, " has shape ",
              shape_text(tokens), ", so the same is expected");
  return to_contiguous(*mask);
}

Tensor checked_ids(const Tensor& ids, const char* name, const Tensor& rows_of, const char* rows_name) {
  check_type(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, name, " has dtype ",
             dtype_name(ids.scalar_type()), "; accepted: int64, int32");
  check_value(ids.dim() == 1 && rows_of.dim() > 0 && ids.size(0) == rows_of.size(0), name, " has shape ", shape_text(ids), "; ",
              rows_name, " has shape ", shape_text(rows_of), ", so [", rows_of.dim() > 0 ? rows_of.size(0) : 0,
              "] is expected");
  check_same_device(ids, name, rows_of, rows_name);
  return to_contiguous(cast(ids, ScalarType::Long));
}

Tensor checked_group(const Tensor& group, const Tensor& rows_of, const char* rows_name) {
  return checked_ids(group, "group", rows_of, rows_name);
}

std::pair<Tensor, Tensor> sort_ids(const Tensor& ids) {
  namespace sd = torch::stable::detail;
  std::array<StableIValue, 4> stack{sd::from(ids), sd::from(std::optional<bool>(true)), sd::from(int64_t(0)), sd::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {sd::to<Tensor>(stack[0]), sd::to<Tensor>(stack[1])};
}

GroupIds::GroupIds(const Tensor& checked) : ids(data<int64_t>(checked)), unsorted_(checked) {
  if (!checked.is_cuda() || checked.numel() <= kScanIdsUpTo) return;
  sorted_ = sort_ids(checked);
  ids = data<int64_t>(sorted_->first);
  order = data<int64_t>(sorted_->second);
}

}  // namespace prefkern
