// What the walks over a linear head share: its checked arguments and the operands of its GEMMs.
#pragma once
#include <algorithm>
#include <optional>

#include "core/gemm.h"
#include "core/plan.h"
#include "logprobs/head.h"

namespace prefkern {

// What linear_logprobs_ext takes beside the head.
struct HeadExtras {
  OptTensor lora_a, lora_b;  // both or neither
  double lora_scale = 1;
  int64_t logits_dtype = 0;  // a DType: f32 for logits as they are accumulated, or what they are rounded to
  OptTensor keep_offsets, keep_ids;  // both or neither
};

// A low-rank update of the weight, W + scale b a, that is never formed: its part of the logits is scale (h a^T) b^T.
struct Lora {
  Tensor a, b;  // [rank, H], [V, rank]
  double scale;
  int64_t rank() const { return a.size(0); }
};

// The tokens that each row keeps.
struct KeptTokens {
  Tensor begin, end, ids;  // [N] each, where the row's ids begin and end; all ids
  KeptIds from_row(int64_t r) const {
    return {data<int64_t>(begin) + r, data<int64_t>(end) + r, ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long,
            ids.numel()};
  }
};

// Where the rows of a weight lie in a vocabulary of which it holds a part.
struct VocabRange {
  int64_t first_col, vocab;
};

struct Head {
  Tensor hidden, weight, targets;
  OptTensor bias, row_temperature;  // accumulator type
  HeadOptions options;
  DType dtype, acc;
  int64_t rows, width, vocab;  // the rows of the weight
  bool cuda;
  void* stream;
  ChunkPlan plan;
  std::optional<Lora> lora = std::nullopt;
  // What raw logits are rounded to, with the bias and the update in them, and the type of a block of them: that of the
  // accumulators, or what they are rounded to where the GEMM can write it.
  std::optional<DType> rounded = std::nullopt;
  DType logits = DType::f32;
  std::optional<KeptTokens> keep = std::nullopt;  // make_head leaves these to the caller
  std::optional<VocabRange> range = std::nullopt;
};

void check_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias);
void check_extras(const Tensor& hidden, const Tensor& weight, const HeadExtras& extras);  // after check_head
// On the CPU it looks at every id of the rows that count. `targets` is checked.
std::optional<KeptTokens> checked_keep(const HeadExtras& extras, const Tensor& hidden, const Tensor& targets, int64_t vocab,
                                       int64_t ignore_index);
// `plan` is left to the caller.
Head make_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
               const OptTensor& row_temperature, const HeadOptions& options, const HeadExtras& extras = {});
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

// The factors of a head's products, and the logits they make, for a walk over blocks of the vocabulary (outer) and chunks of
// rows (inner) as the plan cuts them.
class HeadFactors {
 public:
  explicit HeadFactors(const Head& h)
      : h_(h), hidden_(h.hidden, h, h.plan.row_chunk), weight_(h.weight, h, h.plan.vocab_block) {
    if (!h.lora) return;
    a_.emplace(h.lora->a, h, h.lora->rank());
    b_.emplace(h.lora->b, h, h.plan.vocab_block);
    t_ = empty({h.rows, h.lora->rank()}, scalar_type(type()), h.hidden);
  }
  DType type() const { return hidden_.type(); }  // of every factor: the inputs' on CUDA, the accumulators' on the CPU
  Matrix hidden(int64_t r, int64_t rows) { return hidden_.rows(r, rows); }
  Matrix weight(int64_t v, int64_t cols, bool transposed = false) { return weight_.rows(v, cols, transposed); }
  Matrix lora_a(bool transposed = false) { return a_->rows(0, h_.lora->rank(), transposed); }
  Matrix lora_b(int64_t v, int64_t cols, bool transposed = false) { return b_->rows(v, cols, transposed); }
  // h a^T of these rows, which the first block of the vocabulary leaves for all others.
  Matrix lora_t(int64_t r) const {
    const int64_t rank = h_.lora->rank();
    return {static_cast<const char*>(t_->const_data_ptr()) + r * rank * element_size(type()), rank, false};
  }
  void write_lora_t(int64_t r, int64_t rows) {
    const int64_t rank = h_.lora->rank();
    gemm(h_.hidden, type(), rows, rank, h_.width, hidden(r, rows), lora_a(true), const_cast<void*>(lora_t(r).data), type(),
         rank, false);
  }

  // z [rows, cols], in the type of the blocks: the products, without the bias, which is part of the block's transform; or,
  // rounded, with it.
  void write_logits(int64_t v, int64_t cols, int64_t r, int64_t rows, void* z) {
    const Matrix x = hidden(r, rows);
    gemm(h_.hidden, type(), rows, cols, h_.width, x, weight(v, cols, true), z, h_.logits, cols, false);
    if (h_.lora) add_lora(v, cols, r, rows, z);
    if (h_.rounded && h_.logits == h_.acc)
      run_round({static_cast<float*>(z), rows, cols, h_.bias ? data<float>(*h_.bias) + v : nullptr, *h_.rounded}, h_.stream,
                h_.cuda);
  }

 private:
  void add_lora(int64_t v, int64_t cols, int64_t r, int64_t rows, void* z) {
    const int64_t rank = h_.lora->rank();
    if (v == 0) write_lora_t(r, rows);
    gemm(h_.hidden, type(), rows, cols, rank, lora_t(r), lora_b(v, cols, true), z, h_.acc, cols, true, h_.lora->scale);
  }

  const Head& h_;
  Operand hidden_, weight_;
  std::optional<Operand> a_, b_;
  OptTensor t_;
};

// Rows [r, r + rows) and columns [v, v + cols) of the logits.
template <class S> LogitBlock<S> block_of(const Head& h, int64_t v, int64_t cols, int64_t r, int64_t rows) {
  const VocabRange range = h.range.value_or(VocabRange{0, h.vocab});
  LogitBlock<S> b = logit_block<S>(h.logits, rows, cols, range.vocab, h.targets, h.options, h.row_temperature);
  b.first_col = range.first_col + v;
  b.transform.masked = h.keep.has_value();
  if (h.bias && !h.rounded) b.transform.bias = data<S>(*h.bias) + v;
  advance_rows(b, r);
  return b;
}

// -inf for what the rows of this block do not keep, after its logits have been written.
template <class S> void mask_block(const Head& h, const LogitBlock<S>& block, int64_t r, void* z, S* mean_logit = nullptr) {
  if (h.keep) run_keep(KeepArgs<S>{block, z, h.keep->from_row(r), mean_logit}, h.stream, h.cuda);
}

template <class T> void advance(T*& pointer, int64_t by) {
  if (pointer) pointer += by;
}

}  // namespace prefkern
