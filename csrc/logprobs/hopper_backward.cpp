#include "logprobs/hopper_backward.h"

#include "core/gemm_bounded.h"
#include "logprobs/compact_rows.h"
#include "logprobs/cuda_forward.h"
#include "logprobs/hopper_forward.h"

namespace prefkern {
namespace {

// A call's rows moved together.
struct Compact {
  Head head;
  GradArgs<float> grad;  // with the upstream of these rows
  Tensor count, place;
  Tensor vectors;  // what grad points into
};

Compact compact(const Head& h, const GradArgs<float>& upstream) {
  const auto vector = [&](int64_t n) { return empty({n}, ScalarType::Long, h.hidden); };
  Tensor index = vector(h.rows), targets = vector(h.rows), hidden = empty({h.rows, h.width}, scalar_type(h.dtype), h.hidden);
  Compact c{h, upstream, vector(1), vector(h.rows), empty({kCompactVectors, h.rows}, ScalarType::Float, h.hidden)};
  CompactArgs rows;
  rows.rows = h.rows;
  rows.targets = data<int64_t>(h.targets);
  rows.ignore_index = h.options.ignore_index;
  rows.count = mutable_data<int64_t>(c.count);
  rows.index = mutable_data<int64_t>(index);
  rows.place = mutable_data<int64_t>(c.place);
  check_cuda(cuda_compact(rows, h.stream));

  const int64_t bytes = element_size(h.dtype);
  check_cuda(cuda_gather_rows({h.rows, h.width * bytes, rows.index, rows.count, h.hidden.const_data_ptr(),
                               row_stride(h.hidden) * bytes, hidden.mutable_data_ptr()},
                              h.stream));
  GatherVectorsArgs v;
  v.rows = h.rows;
  v.index = rows.index;
  v.ignore_index = rows.ignore_index;
  v.targets = rows.targets;
  v.out_targets = mutable_data<int64_t>(targets);
  v.row_max = upstream.row_max;
  v.row_log2_sum = upstream.row_log2_sum;
  v.entropy = upstream.entropy;
  v.g_logp = upstream.g_logp;
  v.g_entropy = upstream.g_entropy;
  v.g_lse = upstream.g_lse;
  v.temperature = data_or_null<float>(h.row_temperature);
  v.out = mutable_data<float>(c.vectors);
  check_cuda(cuda_gather_vectors(v, h.stream));
  const auto moved = [&](const float* from, int64_t k) { return from ? v.out + k * h.rows : nullptr; };
  c.grad.row_max = moved(v.row_max, 0);
  c.grad.row_log2_sum = moved(v.row_log2_sum, 1);
  c.grad.entropy = moved(v.entropy, 2);
  c.grad.g_logp = moved(v.g_logp, 3);
  c.grad.g_entropy = moved(v.g_entropy, 4);
  c.grad.g_lse = moved(v.g_lse, 5);
  c.grad.compact_count = rows.count;
  c.head.hidden = hidden;
  c.head.targets = targets;
  if (h.row_temperature) c.head.row_temperature = torch::stable::select(c.vectors, 0, 6);
  // Chunks begin where the zeros of compact matrices may end.
  c.head.plan.row_chunk = ceil_div(h.plan.row_chunk, kCompactMultiple) * kCompactMultiple;
  return c;
}

}  // namespace

bool takes_compact_backward(const Head& h) {
  if (!h.cuda || cuda_backward() != CudaBackward::compact || h.lora || h.rounded || h.keep) return false;
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && row_stride(t) % 8 == 0;
  };
  const bool blocks = h.plan.vocab_block % 8 == 0 || h.plan.vocab_block == h.vocab;
  return (h.dtype == DType::bf16 || h.dtype == DType::f16) && h.width % 8 == 0 && h.vocab % 8 == 0 && blocks &&
         aligned(h.weight) && hopper_head_compiled() && hopper_device();
}

HeadGrads compact_backward(const Head& all, const GradArgs<float>& upstream, int64_t needs) {
  const Compact c = compact(all, upstream);
  const Head& h = c.head;
  const auto none = [&] { return empty({0}, ScalarType::Float, h.hidden); };  // one each: results may not share memory
  const int64_t cols = h.plan.vocab_block, chunk = std::min(h.plan.row_chunk, h.rows), bytes = element_size(h.dtype);
  Tensor logits = empty({chunk, cols}, ScalarType::Float, h.hidden);
  Tensor d_rows = needs & kGradHidden ? empty({h.rows, h.width}, ScalarType::Float, h.hidden) : none();
  Tensor d_weight = needs & kGradWeight ? empty({h.vocab, h.width}, scalar_type(h.dtype), h.hidden) : none();
  Tensor block = needs & kGradWeight ? empty({cols, h.width}, ScalarType::Float, h.hidden) : none();
  Tensor d_bias = needs & kGradBias ? empty({h.vocab}, ScalarType::Float, h.hidden) : none();
  float* z = mutable_data<float>(logits);
  for (int64_t v = 0; v < h.vocab; v += cols) {
    const int64_t n_cols = std::min(cols, h.vocab - v);
    const char* weight = static_cast<const char*>(h.weight.const_data_ptr()) + v * row_stride(h.weight) * bytes;
    for (int64_t r = 0; r < h.rows; r += chunk) {
      const int64_t n_rows = std::min(chunk, h.rows - r);
      const char* hidden = static_cast<const char*>(h.hidden.const_data_ptr()) + r * h.width * bytes;
      const auto multiply = [&](BoundedProduct product, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_stride,
                                const void* b, int64_t b_stride, float* to, int64_t to_stride, bool accumulate) {
        check_cuda(cuda_gemm_bounded(
            {product, h.dtype, m, n, k, a, b, a_stride, b_stride, to_stride, to, accumulate, c.grad.compact_count, r},
            h.stream));
      };
      multiply(BoundedProduct::rows_nt, n_rows, n_cols, h.width, hidden, h.width, weight, row_stride(h.weight), z, n_cols,
               false);
      GradArgs<float> g = c.grad;
      g.block = block_of<float>(h, v, n_cols, r, n_rows);
      g.logits = g.grad = z;
      g.logits_map = {1, n_cols, 0};
      g.grad_dtype = h.dtype;
      const int64_t stride = 2 * n_cols;  // a gradient lies at the start of its logits' row
      g.grad_map = {1, stride, 0};
      g.compact_first = r;
      for (const float** p : {&g.row_max, &g.row_log2_sum, &g.entropy, &g.g_logp, &g.g_entropy, &g.g_lse}) advance(*p, r);
      if (needs & kGradBias) bias_on_cuda(g, mutable_data<float>(d_bias) + v, r > 0, h.stream);
      run_grad(g, h.stream, true);
      if (needs & kGradHidden)
        multiply(BoundedProduct::rows_nn, n_rows, h.width, n_cols, z, stride, weight, row_stride(h.weight),
                 mutable_data<float>(d_rows) + r * h.width, h.width, v > 0);
      if (needs & kGradWeight)
        multiply(BoundedProduct::depth_tn, n_cols, h.width, n_rows, z, stride, hidden, h.width, mutable_data<float>(block),
                 h.width, r > 0);
    }
    if (needs & kGradWeight) {
      Tensor done = torch::stable::narrow(d_weight, 0, v, n_cols);
      torch::stable::copy_(done, torch::stable::narrow(block, 0, 0, n_cols));
    }
  }
  Tensor d_hidden = none();
  if (needs & kGradHidden) {
    const DType type = h.range ? DType::f32 : h.dtype;
    d_hidden = empty({h.rows, h.width}, scalar_type(type), h.hidden);
    check_cuda(cuda_scatter_rows(
        {h.rows, h.width, data<int64_t>(c.place), data<float>(d_rows), d_hidden.mutable_data_ptr(), type}, h.stream));
  }
  return {d_hidden, d_weight, d_bias, none(), none()};
}

}  // namespace prefkern
