// Checks of arguments that ops of several rooms share, and what they turn into: token arrays with their layout, group ids.
#pragma once
#include <optional>
#include <utility>

#include "core/sequence.h"
#include "core/tensor.h"

namespace prefkern {

bool same_shape(const Tensor& a, const Tensor& b);

// `tokens` ([B, T], or [N] with cu_seqlens) as sequences. On the CPU every boundary is looked at; on CUDA the kernel finds
// a wrong one (sequence_valid). cu_seqlens must be contiguous and outlive the layout.
SequenceLayout checked_layout(const Tensor& tokens, const char* name, const OptTensor& cu_seqlens,
                              const char* cu_name = "cu_seqlens");

// `t`, shaped like `tokens` and on its device, contiguous and of type `type`.
Tensor checked_tokens(const Tensor& t, const char* name, const Tensor& tokens, const char* tokens_name, ScalarType type);
OptTensor checked_mask(const OptTensor& mask, const Tensor& tokens, const char* tokens_name, const char* name = "mask");

// Integers, one per row, as contiguous int64 on the device of `rows_of`, whose first dimension is that of the rows.
Tensor checked_ids(const Tensor& ids, const char* name, const Tensor& rows_of, const char* rows_name);
Tensor checked_group(const Tensor& group, const Tensor& rows_of, const char* rows_name);  // the same, named group

// Ids in ascending order, and the row of each; equal ids keep the order of their rows. No synchronisation on CUDA.
std::pair<Tensor, Tensor> sort_ids(const Tensor& ids);

// Checked group ids as a kernel takes them: in the order of the rows, or, many of them on CUDA, sorted, with the row of each
// in `order`. Keeps alive what it points to: must outlive the launch.
struct GroupIds {
  explicit GroupIds(const Tensor& checked);

  const int64_t *ids, *order = nullptr;

 private:
  Tensor unsorted_;
  std::optional<std::pair<Tensor, Tensor>> sorted_;
};

}  // namespace prefkern
