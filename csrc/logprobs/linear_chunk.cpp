// linear_chunk: the head over a chunk of rows whose logits are kept, for losses whose gradient is known as soon as the
// log-probabilities of the chunk are: 3 GEMMs of 2 N V H flops in all, where linear_logprobs and its backward make 4.
//
// The blocks are those of linear_logprobs, but lie one behind the other in the workspace: block v is [N, columns] at N * v.
// On the CPU a block is folded while it is in cache, and again its gradient is multiplied while it is. On CUDA all columns
// are one block.
//
// On the CPU the backward drops the rows that do not contribute: when the gradient of a block has been written, its active rows
// move together, and the GEMMs see no others. So do the rows of hidden and of its gradient.
//
// There, too, the workspace may be the end of d_weight's own memory: N rows of logits are no longer than a row of the weight. The
// gradient of a block of logits then goes to a buffer, and d_weight is written from its beginning, behind what is still to be read:
// row v + 1 of it ends where the logits of the columns from v + 1 on begin, or before.
#include "logprobs/linear_head.h"

namespace prefkern {
namespace {

// Where gradients in the weight's own narrow type are written: on the CPU, columns at a time through a float32 buffer.
constexpr int64_t kNarrowColumns = 8192;

Head chunk_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptTensor& bias,
                const OptTensor& row_temperature, const HeadOptions& options) {
  check_head(hidden, weight, bias);
  check_head_options(options);
  const int64_t rows = hidden.size(0);
  const DType acc = accumulator(float_dtype(hidden, "hidden"));
  const Tensor t = checked_targets(targets, hidden, "hidden", rows, weight.size(0), options.ignore_index).first;
  const OptTensor tau = checked_row_temperature(row_temperature, hidden, "hidden", rows, acc);
  Head h = make_head(hidden, weight, t, bias, tau, options);
  h.plan.row_chunk = rows;
  h.plan.vocab_block = kept_block(rows, h.vocab, h.dtype, h.cuda);
  return h;
}

// Whether the workspace is the end of d_weight's memory.
bool lies_in_gradient(const Tensor& workspace, const OptTensor& d_weight, const Head& h, bool accumulate) {
  if (!d_weight || h.cuda) return false;
  const auto bytes = [](const Tensor& t) { return t.numel() * element_size(float_dtype(t, "d_weight")); };
  const auto *begin = static_cast<const char*>(d_weight->const_data_ptr()), *end = begin + bytes(*d_weight);
  const auto *from = static_cast<const char*>(workspace.const_data_ptr()), *to = from + bytes(workspace);
  if (to <= begin || from >= end) return false;
  check_value(!accumulate && from >= begin && to == end && workspace.numel() == h.rows * h.vocab,
              "workspace overlaps d_weight; it may only be the last N * V elements of its memory, and only without accumulate");
  return true;
}

void check_workspace(const Tensor& workspace, const Head& h) {
  check_type(workspace.scalar_type() == scalar_type(h.acc), "workspace has dtype ", dtype_name(workspace.scalar_type()),
             "; expected ", dtype_name(scalar_type(h.acc)));
  check_same_device(workspace, "workspace", h.hidden, "hidden");
  check_value(workspace.is_contiguous() && workspace.numel() >= h.rows * h.vocab, "workspace has shape ", shape_text(workspace),
              "; expected N * V = ", h.rows * h.vocab, " adjacent elements or more");
}

void check_grad(const OptTensor& grad, const char* name, const Head& h, std::initializer_list<int64_t> shape, bool narrow) {
  if (!grad) return;
  const ScalarType type = grad->scalar_type();
  check_type(type == scalar_type(h.acc) || (narrow && type == scalar_type(h.dtype)), name, " has dtype ", dtype_name(type),
             "; expected ", dtype_name(scalar_type(h.acc)));
  check_same_device(*grad, name, h.hidden, "hidden");
  bool same = grad->is_contiguous() && grad->dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); i++) same = grad->size(int64_t(i)) == shape.begin()[i];
  check_value(same, name, " has shape ", shape_text(*grad), "; expected ",
              shape.size() == 1            ? "[V]"
              : shape.begin()[0] == h.rows ? "[N, H]"
                                           : "[V, H]",
              ", contiguous");
}

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block) body(v, std::min(h.plan.vocab_block, h.vocab - v));
}

template <class S> void forward_chunk(const Head& h, S* z, int64_t outputs, const HeadOutputs& out) {
  FoldArgs<S> f;
  set_outputs(f, out, outputs, h.rows);
  OptTensor state;
  if (h.plan.vocab_block < h.vocab) state = empty({kRowStateArrays, h.rows}, scalar_type(h.acc), h.hidden);
  Operand hidden(h.hidden, h, h.rows), weight(h.weight, h, h.plan.vocab_block);
  for_blocks(h, [&](int64_t v, int64_t cols) {
    S* block = z + h.rows * v;
    gemm(h.hidden, hidden.type(), h.rows, cols, h.width, hidden.rows(0, h.rows), weight.rows(v, cols, true), block, h.acc, cols,
         false);
    f.block = block_of<S>(h, v, cols, 0, h.rows);
    f.logits = block;
    f.logits_map = {1, cols, 0};
    f.first = v == 0;
    f.last = v + cols == h.vocab;
    f.state = state ? mutable_data<S>(*state) : nullptr;
    f.state_stride = h.rows;
    run_fold(f, h.stream, h.cuda);
  });
}

// The weight's gradient of a block of columns; of the weight's own type through a buffer.
template <class S> class WeightGrad {
 public:
  WeightGrad(const Head& h, int64_t rows, const OptTensor& into, bool accumulate)
      : h_(h), rows_(rows), into_(into), accumulate_(accumulate) {
    if (!into || h.cuda || into->scalar_type() == scalar_type(h.acc)) return;
    step_ = std::min(h.plan.vocab_block, kNarrowColumns);
    buffer_ = empty({step_, h.width}, scalar_type(h.acc), h.hidden);
  }
  void add(DType type, int64_t v, int64_t cols, const Matrix& dz, const Matrix& x) {
    if (!into_) return;
    if (!buffer_) {
      const DType own = float_dtype(*into_, "d_weight");
      char* rows = static_cast<char*>(into_->mutable_data_ptr()) + v * h_.width * element_size(own);
      return multiply(type, cols, dz, x, rows, own, accumulate_);
    }
    for (int64_t c = 0; c < cols; c += step_) {
      const int64_t n = std::min(step_, cols - c);
      const Matrix part{static_cast<const char*>(dz.data) + c * element_size(type), dz.stride, true};
      multiply(type, n, part, x, mutable_data<S>(*buffer_), h_.acc, false);
      Tensor rows = torch::stable::narrow(*into_, 0, v + c, n);
      torch::stable::copy_(rows, torch::stable::narrow(*buffer_, 0, 0, n));
    }
  }

 private:
  void multiply(DType type, int64_t cols, const Matrix& dz, const Matrix& x, void* into, DType into_type, bool accumulate) {
    gemm(h_.hidden, type, cols, h_.width, rows_, {dz.data, dz.stride, true}, x, into, into_type, h_.width, accumulate);
  }
  const Head& h_;
  int64_t rows_;
  OptTensor into_, buffer_;
  bool accumulate_;
  int64_t step_ = 0;
};

struct ChunkGrads {
  OptTensor hidden, weight, bias;
  bool accumulate, over_logits;  // the weight's, written over the workspace
};

// Of `h` all rows are in the workspace; those of `active` are multiplied.
template <class S>
void backward_chunk(const Head& h, const ActiveRows& active, S* z, GradArgs<S> g, const ChunkGrads& grads) {
  const int64_t rows = active.count;
  const int64_t* index = active.index ? data<int64_t>(*active.index) : nullptr;
  // On CUDA the logits' gradient is narrowed in place to the inputs' type, so that tensor cores take it.
  const DType type = h.cuda ? h.dtype : h.acc;
  OptTensor ones;
  if (grads.bias && !h.cuda) {
    ones = empty({rows}, scalar_type(type), h.hidden);
    ones = torch::stable::fill_(*ones, 1.0);
  }
  // On CUDA, where inactive rows stay between the others, 0 times NaN may not reach the weight's gradient.
  const Tensor x = !grads.weight ? h.hidden
                   : h.cuda      ? without_ignored_rows(h.hidden, h.targets, h.options.ignore_index)
                   : index       ? index_rows(h.hidden, *active.index)
                                 : h.hidden;
  WeightGrad<S> d_weight(h, rows, grads.weight, grads.accumulate);
  Operand hidden(x, h, rows), weight(h.weight, h, h.plan.vocab_block);
  OptTensor buffer;
  if (grads.over_logits) buffer = empty({h.rows * h.plan.vocab_block}, scalar_type(h.acc), h.hidden);
  for_blocks(h, [&](int64_t v, int64_t cols) {
    S* block = buffer ? mutable_data<S>(*buffer) : z + h.rows * v;
    g.block = block_of<S>(h, v, cols, 0, h.rows);
    g.logits = z + h.rows * v;
    g.grad = block;
    g.logits_map = {1, cols, 0};
    const int64_t stride = cols * int64_t(sizeof(S)) / element_size(type);
    g.grad_dtype = type;
    g.grad_map = {1, stride, 0};
    if (grads.bias && h.cuda) bias_on_cuda(g, mutable_data<S>(*grads.bias) + v, grads.accumulate, h.stream);
    run_grad(g, h.stream, h.cuda);
    if (index) cpu_compact_rows(block, cols * int64_t(sizeof(S)), index, rows);
    const Matrix dz{block, stride, false};
    if (grads.hidden)
      gemm(h.hidden, type, rows, h.width, cols, dz, weight.rows(v, cols), mutable_data<S>(*grads.hidden), h.acc, h.width,
           v > 0);
    if (grads.weight) d_weight.add(type, v, cols, dz, hidden.rows(0, rows));
    if (grads.bias && !h.cuda)
      gemm(h.hidden, type, 1, cols, rows, {ones->const_data_ptr(), rows, false}, dz, mutable_data<S>(*grads.bias) + v, h.acc,
           cols, grads.accumulate);
  });
  if (index && grads.hidden) cpu_spread_rows(mutable_data<S>(*grads.hidden), h.width * int64_t(sizeof(S)), index, rows, h.rows);
}

}  // namespace

HeadOutputs linear_chunk(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                         OptTensor row_temperature, Tensor workspace, double temperature, double softcap, double logit_scale,
                         int64_t ignore_index, int64_t outputs) {
  const Head h = chunk_head(hidden, weight, targets, bias, row_temperature, {temperature, softcap, logit_scale, ignore_index});
  check_workspace(workspace, h);
  const OnDevice guard(hidden);
  const HeadOutputs out = make_outputs(outputs, h.rows, h.acc, hidden, false);
  if (h.rows == 0) return out;
  h.acc == DType::f64 ? forward_chunk(h, mutable_data<double>(workspace), outputs, out)
                      : forward_chunk(h, mutable_data<float>(workspace), outputs, out);
  return out;
}

void linear_chunk_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight,
                           const Tensor& targets, OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                           const Tensor& stats, Tensor workspace, OptTensor d_hidden, OptTensor d_weight, OptTensor d_bias,
                           double temperature, double softcap, double logit_scale, int64_t ignore_index, bool accumulate) {
  Head h = chunk_head(hidden, weight, targets, bias, row_temperature, {temperature, softcap, logit_scale, ignore_index});
  check_workspace(workspace, h);
  check_grad(d_hidden, "d_hidden", h, {h.rows, h.width}, false);
  check_grad(d_weight, "d_weight", h, {h.vocab, h.width}, !accumulate);
  check_grad(d_bias, "d_bias", h, {h.vocab}, false);
  const bool over_logits = lies_in_gradient(workspace, d_weight, h, accumulate);
  const OnDevice guard(hidden);
  const Upstream up = checked_upstream(g_logp, g_entropy, g_lse, h.rows, h.acc, entropy, stats);
  const ActiveRows active = active_rows_of(h.targets, ignore_index, up);
  h.targets = active.targets;
  if (active.count == 0) {
    if (d_hidden) torch::stable::zero_(*d_hidden);
    for (OptTensor* t : {&d_weight, &d_bias})
      if (*t && !accumulate) torch::stable::zero_(**t);
    return;
  }
  const ChunkGrads grads{d_hidden, d_weight, d_bias, accumulate, over_logits};
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    GradArgs<S> g;
    set_upstream(g, up, entropy, stats, h.rows);
    backward_chunk(h, active, mutable_data<S>(workspace), g, grads);
  };
  h.acc == DType::f64 ? run(0.0) : run(0.0f);
}

}  // namespace prefkern
