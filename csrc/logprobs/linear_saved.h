// What a forward over a linear head may save for its backward beside two numbers per row, so that the logits are not computed
// again: the logits themselves, or, where the head is frozen, the gradients of each row's outputs in its hidden state.
#pragma once
#include <array>

#include "logprobs/linear_head.h"
#include "logprobs/row_gradients.h"

namespace prefkern {

// What is saved: `save` of linear_logprobs_saving.
enum class Save : int64_t { nothing = 0, logits = 1, row_gradients = 2 };

// The type that logits are kept in: what they are rounded to anyway, or that of the inputs.
inline DType kept_type(const Head& h) { return h.rounded.value_or(h.dtype); }

// Raw logits, as they are before the bias (rounded: with it), block after block: that of columns [v, v + cols) is [rows, cols] at
// rows * v, of the rows that count. There is room for all N * V; pages behind the rows that count stay untouched.
class KeptLogits {
 public:
  KeptLogits(const Head& h, int64_t rows, Tensor store) : type_(kept_type(h)), store_(store), rows_(rows) {}
  // Where the GEMM may write the block itself.
  bool direct(const Head& h) const { return type_ == h.logits; }
  void* at(int64_t v, int64_t cols, int64_t r) const {
    return static_cast<char*>(store_.mutable_data_ptr()) + (rows_ * v + r * cols) * element_size(type_);
  }
  void write(int64_t v, int64_t cols, int64_t r, int64_t rows, const Tensor& block) {
    Tensor into = part(store_, rows_ * v + r * cols, rows * cols);
    torch::stable::copy_(into, part(block, 0, rows * cols));
  }
  // Rows [r, r + rows) of those that `index` chooses of the kept ones, or of all of them.
  void read(int64_t v, int64_t cols, int64_t r, int64_t rows, const OptTensor& index, const Tensor& block) const {
    Tensor into = part(block, 0, rows * cols);
    if (!index) {
      torch::stable::copy_(into, part(store_, rows_ * v + r * cols, rows * cols));
      return;
    }
    const Tensor all = as_rows(part(store_, rows_ * v, rows_ * cols), rows_, cols);
    into = as_rows(into, rows, cols);
    torch::stable::copy_(into, index_rows(all, part(*index, r, rows)));
  }

 private:
  static Tensor part(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }
  static Tensor as_rows(const Tensor& t, int64_t rows, int64_t cols) {
    const std::array<int64_t, 2> shape{rows, cols};
    return torch::stable::view(t, {shape.data(), 2});
  }

  DType type_;
  Tensor store_;
  int64_t rows_;
};

// The sums behind the gradients of row_gradients.h, over the blocks of a walk. `gradients` is [K, N, H] in the accumulator type,
// that of logp, of entropy and of lse, as far as they are outputs; the first rows of each are taken.
template <class S> class RowGradients {
 public:
  RowGradients(const Head& h, int64_t outputs, const Tensor& gradients) : h_(h) {
    const int64_t one = gradients.size(1) * h.width;
    S* next = mutable_data<S>(gradients);
    a_ = next;
    if (outputs & kEntropy) b_ = next += one;
    if (outputs & kLse) lse_ = next += one;
    held_ = empty({h.rows}, scalar_type(h.acc), h.hidden);
    target_slope_ = empty({h.rows}, scalar_type(h.acc), h.hidden);
    if (b_) scaled_ = empty({h.plan.row_chunk * h.plan.vocab_block}, scalar_type(h.acc), h.hidden);
  }

  // A block that has been folded, whose logits become weights. `max` is that of row r.
  void add(HeadFactors& factors, const LogitBlock<S>& block, int64_t v, int64_t r, S* z, const S* max) {
    WeighArgs<S> w;
    w.block = block;
    w.logits = w.weights = z;
    w.scaled_weights = scaled_ ? mutable_data<S>(*scaled_) : nullptr;
    w.max = max;
    w.held = mutable_data<S>(held_) + r;
    w.first = v == 0;
    w.a = a_ + r * h_.width;
    w.b = b_ ? b_ + r * h_.width : nullptr;
    w.width = h_.width;
    w.target_slope = mutable_data<S>(target_slope_) + r;
    cpu_weigh_logits(w);
    const auto multiply = [&](const S* weights, S* into) {
      gemm(h_.hidden, factors.type(), block.rows, h_.width, block.cols, {weights, block.cols, false},
           factors.weight(v, block.cols), into, h_.acc, h_.width, v > 0);
    };
    multiply(w.weights, w.a);
    if (w.b) multiply(w.scaled_weights, w.b);
  }

  // After the last block. `target_kept` [N]: 0 where no gradient flows to logp, else 1.
  void finish(const HeadOutputs& out, const OptTensor& target_kept) {
    RowGradientArgs<S> f;
    f.block = block_of<S>(h_, 0, h_.vocab, 0, h_.rows);
    f.weight = h_.weight.const_data_ptr();
    f.weight_dtype = h_.dtype;
    f.weight_stride = row_stride(h_.weight);
    f.width = h_.width;
    f.row_log2_sum = data<S>(std::get<6>(out)) + h_.rows;
    f.entropy = b_ ? data<S>(std::get<1>(out)) : nullptr;
    f.target_slope = data<S>(target_slope_);
    f.target_kept = data_or_null<S>(target_kept);
    f.logp = a_;
    f.entropy_grad = b_;
    f.lse = lse_;
    cpu_finish_row_gradients(f);
  }

 private:
  const Head& h_;
  S *a_ = nullptr, *b_ = nullptr, *lse_ = nullptr;
  Tensor held_, target_slope_;
  OptTensor scaled_;
};

}  // namespace prefkern
