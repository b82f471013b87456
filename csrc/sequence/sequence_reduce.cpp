// sequence_reduce: sums and means over the tokens of each sequence, padded [B, T] or packed [N], and their gradient.
#include <cmath>
#include <type_traits>

#include "core/arguments.h"
#include "sequence/ops.h"
#include "sequence/sequence_sums.h"

namespace prefkern {
namespace {

// Everything checked and contiguous; what the arguments point to lives as long as this.
struct Inputs {
  Tensor values;
  OptTensor mask, cu_seqlens, minus, weights, starts, ends, head;
  PlaceRule place;
  SequenceLayout layout;
  DType dtype;
};

OptTensor checked_per_sequence(const OptTensor& t, const char* name, const Tensor& values, int64_t sequences) {
  if (!t) return t;
  check_type(t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int, name, " has dtype ",
             dtype_name(t->scalar_type()), "; accepted: int64, int32");
  check_same_device(*t, name, values, "values");
  check_value(t->dim() == 1 && t->size(0) == sequences, name, " has shape ", shape_text(*t), "; expected [", sequences,
              "] (one per sequence)");
  return to_contiguous(cast(*t, ScalarType::Long));
}

void check_spans(const Inputs& in) {
  const int64_t *starts = data_or_null<int64_t>(in.starts), *ends = data_or_null<int64_t>(in.ends);
  const int64_t* head = data_or_null<int64_t>(in.head);
  for (int64_t b = 0; b < in.layout.sequences; b++) {
    const int64_t size = sequence_end(in.layout, b) - sequence_begin(in.layout, b);
    if (ends) check_value(ends[b] >= 0 && ends[b] <= size, "ends[", b, "] is ", ends[b], "; it must lie in [0, ", size, "]");
    const int64_t end = ends ? ends[b] : size;
    if (starts)
      check_value(starts[b] >= 0 && starts[b] <= end, "starts[", b, "] is ", starts[b], "; it must lie in [0, ", end, "]");
    if (head) check_value(head[b] >= 0, "head[", b, "] is ", head[b], "; it must not be negative");
  }
}

Inputs checked_inputs(const Tensor& values, const OptTensor& mask, const OptTensor& cu_seqlens, const OptTensor& minus,
                      const OptTensor& weights, int64_t transform, const OptTensor& starts, const OptTensor& ends,
                      const OptTensor& head, double tail_weight, double decay) {
  const DType dtype = float_dtype(values, "values");
  check_type(dtype == accumulator(dtype), "values has dtype ", dtype_name(values.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  check_value(transform >= 0 && transform <= 1, "transform is ", transform, "; accepted: 0, 1");
  check_value(std::isfinite(tail_weight), "tail_weight is ", tail_weight, "; it must be finite");
  check_value(decay >= 0 && decay <= 1, "decay is ", decay, "; it must lie in [0, 1]");
  Inputs in{to_contiguous(values),
            checked_mask(mask, values, "values"),
            cu_seqlens,
            minus,
            weights,
            {},
            {},
            {},
            {tail_weight, decay},
            {},
            dtype};
  if (in.cu_seqlens) in.cu_seqlens = to_contiguous(*cu_seqlens);
  in.layout = checked_layout(values, "values", in.cu_seqlens);
  check_value(in.layout.sequences > 0 || in.layout.tokens == 0, "cu_seqlens has no sequence; values has ", in.layout.tokens,
              " tokens");
  const ScalarType st = values.scalar_type();
  if (minus) in.minus = checked_tokens(*minus, "minus", values, "values", st);
  if (weights) in.weights = checked_tokens(*weights, "weights", values, "values", st);
  in.starts = checked_per_sequence(starts, "starts", values, in.layout.sequences);
  in.ends = checked_per_sequence(ends, "ends", values, in.layout.sequences);
  in.head = checked_per_sequence(head, "head", values, in.layout.sequences);
  if (values.is_cpu() && (starts || ends || head)) check_spans(in);
  return in;
}

template <class S> SequenceSumArgs<S> sum_args(const Inputs& in, int64_t transform, bool mean) {
  SequenceSumArgs<S> a;
  a.transform = static_cast<TokenTransform>(transform);
  a.mean = mean;
  a.layout = in.layout;
  a.values = data<S>(in.values);
  a.minus = data_or_null<S>(in.minus);
  a.weights = data_or_null<S>(in.weights);
  a.mask = data_or_null<uint8_t>(in.mask);
  a.starts = data_or_null<int64_t>(in.starts);
  a.ends = data_or_null<int64_t>(in.ends);
  a.head = data_or_null<int64_t>(in.head);
  a.place = in.place;
  return a;
}

}  // namespace

Tensor sequence_reduce(const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus, OptTensor weights,
                       int64_t transform, bool mean, OptTensor starts, OptTensor ends, OptTensor head, double tail_weight,
                       double decay) {
  const OnDevice guard(values);
  const Inputs in = checked_inputs(values, mask, cu_seqlens, minus, weights, transform, starts, ends, head, tail_weight, decay);
  const Tensor sums = empty({in.layout.sequences}, values.scalar_type(), values);
  if (in.dtype == DType::f64) {
    SequenceSumArgs<double> a = sum_args<double>(in, transform, mean);
    a.sums = mutable_data<double>(sums);
    cpu_sequence_sums(a);
  } else {
    SequenceSumArgs<float> a = sum_args<float>(in, transform, mean);
    a.sums = mutable_data<float>(sums);
    values.is_cuda() ? check_cuda(cuda_sequence_sums(a, current_stream(values))) : cpu_sequence_sums(a);
  }
  return sums;
}

Tensor sequence_reduce_backward(const Tensor& g, const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus,
                                OptTensor weights, int64_t transform, bool mean, OptTensor starts, OptTensor ends,
                                OptTensor head, double tail_weight, double decay) {
  const OnDevice guard(values);
  const Inputs in = checked_inputs(values, mask, cu_seqlens, minus, weights, transform, starts, ends, head, tail_weight, decay);
  check_type(g.scalar_type() == values.scalar_type(), "g has dtype ", dtype_name(g.scalar_type()), "; that of values, ",
             dtype_name(values.scalar_type()), ", is expected");
  check_value(g.dim() == 1 && g.size(0) == in.layout.sequences, "g has shape ", shape_text(g), "; expected [",
              in.layout.sequences, "]");
  check_same_device(g, "g", values, "values");
  const Tensor upstream = to_contiguous(g), grad = torch::stable::empty_like(in.values);
  const auto fill = [&](auto& a) {
    using S = std::remove_pointer_t<decltype(a.grad)>;
    a.upstream = data<S>(upstream);
    a.grad = mutable_data<S>(grad);
  };
  if (in.dtype == DType::f64) {
    SequenceSumArgs<double> a = sum_args<double>(in, transform, mean);
    fill(a);
    cpu_sequence_sums_backward(a);
  } else {
    SequenceSumArgs<float> a = sum_args<float>(in, transform, mean);
    fill(a);
    values.is_cuda() ? check_cuda(cuda_sequence_sums_backward(a, current_stream(values))) : cpu_sequence_sums_backward(a);
  }
  return grad;
}

}  // namespace prefkern
