// What the walks over a linear head share: its checked arguments and the operands of its GEMMs.
#pragma once
#include <algorithm>

#include "core/gemm.h"
#include "core/plan.h"
#include "logprobs/head.h"

namespace prefkern {

struct Head {
  Tensor hidden, weight, targets;
  OptTensor bias, row_temperature;  // accumulator type
  HeadOptions options;
  DType dtype, acc;
  int64_t rows, width, vocab;
  bool cuda;
  void* stream;
  ChunkPlan plan;
};

void check_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias);
// `plan` is left to the caller.
Head make_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
               const OptTensor& row_temperature, const HeadOptions& options);
inline int64_t row_stride(const Tensor& t) { return std::max(t.stride(0), t.size(1)); }  // of a single row it may be anything

// A block of rows of `source` as a matrix a GEMM takes: the tensor itself, or a float32 copy where the CPU must widen.
class Operand {
 public:
  Operand(const Tensor& source, const Head& head, int64_t max_rows) : source_(source), type_(head.dtype) {
    if (!head.cuda && head.dtype != head.acc) {
      buffer_ = empty({max_rows, source.size(1)}, ScalarType::Float, source);
      type_ = head.acc;
    }
  }
  Matrix rows(int64_t first, int64_t count, bool transposed = false) {
    if (!buffer_) {
      const auto* base = static_cast<const char*>(source_.const_data_ptr());
      return {base + first * row_stride(source_) * element_size(type_), row_stride(source_), transposed};
    }
    if (first != held_first_ || count != held_count_) {
      Tensor into = torch::stable::narrow(*buffer_, 0, 0, count);
      torch::stable::copy_(into, torch::stable::narrow(source_, 0, first, count));
      held_first_ = first;
      held_count_ = count;
    }
    return {buffer_->const_data_ptr(), source_.size(1), transposed};
  }
  DType type() const { return type_; }

 private:
  Tensor source_;
  OptTensor buffer_;
  DType type_;
  int64_t held_first_ = -1, held_count_ = -1;
};

// Rows [r, r + rows) and columns [v, v + cols) of the logits.
template <class S> LogitBlock<S> block_of(const Head& h, int64_t v, int64_t cols, int64_t r, int64_t rows) {
  LogitBlock<S> b = logit_block<S>(h.acc, rows, cols, h.vocab, h.targets, h.options, h.row_temperature);
  b.first_col = v;
  if (h.bias) b.transform.bias = data<S>(*h.bias) + v;
  advance_rows(b, r);
  return b;
}

template <class T> void advance(T*& pointer, int64_t by) {
  if (pointer) pointer += by;
}

}  // namespace prefkern
