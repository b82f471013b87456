// seeded_normal_combine: sums of normal numbers that are made where they are added up, as a tensor or into one.
#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "sampling/ops.h"
#include "sampling/seeded_normal.h"

namespace prefkern {
namespace {

constexpr int64_t kMostElements = int64_t(1) << 62;

struct Rows {
  int64_t seed, first_row, count, first_element;

  Rows(int64_t seed, const char* row_name, int64_t first_row, int64_t count, int64_t first_element, int64_t elements)
      : seed(seed), first_row(first_row), count(count), first_element(first_element) {
    check_value(first_row >= 0 && first_row < kNormalRows && first_row + count <= kNormalRows, row_name, " is ", first_row,
                " for ", count, " rows; a seed has rows 0 to 2^32 - 1");
    check_value(first_element >= 0 && first_element <= kMostElements - elements, "element_offset is ", first_element, " for ",
                elements, " elements; a row has elements 0 to 2^62 - 1");
  }
};

// weights: [rows], in the type that is computed in, or none.
template <class S> void run(const Rows& rows, const OptTensor& weights, double scale, DType dtype, int64_t count,
                            const void* add_to, const Tensor& out) {
  NormalArgs<S> a;
  a.seed = static_cast<uint64_t>(rows.seed);
  a.first_row = rows.first_row;
  a.rows = rows.count;
  a.first_element = rows.first_element;
  a.weights = data_or_null<S>(weights);
  a.scale = S(scale);
  a.count = count;
  a.dtype = dtype;
  a.add_to = add_to;
  a.out = out.mutable_data_ptr();
  if constexpr (sizeof(S) == 4) {
    if (out.is_cuda()) return check_cuda(cuda_seeded_normal(a, current_stream(out)));
  }
  cpu_seeded_normal(a);
}

void dispatch(const Rows& rows, const OptTensor& weights, double scale, DType dtype, const void* add_to, const Tensor& out) {
  dtype == DType::f64 ? run<double>(rows, weights, scale, dtype, out.numel(), add_to, out)
                      : run<float>(rows, weights, scale, dtype, out.numel(), add_to, out);
}

Tensor checked_weights(const Tensor& weights, ScalarType type) {
  switch (weights.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: break;
    default:
      check_type(false, "weights has dtype ", dtype_name(weights.scalar_type()),
                 "; accepted: float32, float64, bfloat16, float16");
  }
  check_value(weights.dim() == 1, "weights has shape ", shape_text(weights), "; [m] is expected");
  return to_contiguous(cast(weights, type));
}

void check_inplace(const Tensor& x) { check_value(x.is_contiguous(), "x is not contiguous"); }

}  // namespace

Tensor seeded_normal_combine(const Tensor& weights, OptTensor add_to, int64_t seed, int64_t n, int64_t first_row,
                             int64_t first_element, double scale) {
  const OnDevice guard(weights);
  const DType dtype = add_to ? float_dtype(*add_to, "add_to") : accumulator(float_dtype(weights, "weights"));
  const Tensor w = checked_weights(weights, scalar_type(accumulator(dtype)));
  if (add_to) check_same_device(weights, "weights", *add_to, "add_to");
  if (add_to && n == -1) n = add_to->numel();
  check_value(n >= 0, "n is ", n, "; it must not be negative");
  check_value(!add_to || add_to->numel() == n, "n is ", n, "; add_to has ", add_to ? add_to->numel() : 0, " elements");
  const Rows rows(seed, "first_row", first_row, w.size(0), first_element, n);
  std::vector<int64_t> shape;
  for (int64_t d = 0; add_to && d < add_to->dim(); d++) shape.push_back(add_to->size(d));
  if (!add_to) shape.push_back(n);
  const Tensor from = add_to ? to_contiguous(*add_to) : w;
  const Tensor out = torch::stable::new_empty(from, {shape.data(), shape.size()}, scalar_type(dtype));
  dispatch(rows, w, scale, dtype, add_to ? from.const_data_ptr() : nullptr, out);
  return out;
}

void seeded_normal_combine_inplace(Tensor x, const Tensor& weights, int64_t seed, int64_t first_row, int64_t first_element,
                                   double scale) {
  const OnDevice guard(x);
  const DType dtype = float_dtype(x, "x");
  check_inplace(x);
  const Tensor w = checked_weights(weights, scalar_type(accumulator(dtype)));
  check_same_device(weights, "weights", x, "x");
  const Rows rows(seed, "first_row", first_row, w.size(0), first_element, x.numel());
  dispatch(rows, w, scale, dtype, x.const_data_ptr(), x);
}

void seeded_normal_add_inplace(Tensor x, int64_t seed, int64_t row, int64_t first_element, double mu) {
  const OnDevice guard(x);
  const DType dtype = float_dtype(x, "x");
  check_inplace(x);
  const Rows rows(seed, "row", row, 1, first_element, x.numel());
  dispatch(rows, OptTensor(), mu, dtype, x.const_data_ptr(), x);
}

}  // namespace prefkern
