// gp_unique_posterior: mean and variance of a Gaussian process at candidates, from the factor of its unique points.
#include "core/cuda_runtime.h"
#include "gaussian/gaussian_tensors.h"
#include "gaussian/gp_posterior.h"
#include "gaussian/ops.h"

namespace prefkern {
namespace {

void check_rows_finite(const Tensor& t, const char* name) {
  const double* v = data<double>(t);
  const int64_t n = t.size(0), d = t.size(1);
  double sum = 0;
  for (int64_t i = 0; i < n * d; i++) sum += v[i] * 0;  // NaN if one is not finite
  if (sum == 0) return;
  for (int64_t i = 0; i < n * d; i++)
    check_value(std::isfinite(v[i]), name, "[", i / d, ", ", i % d, "] is ", v[i], "; it must be finite");
}

// What can be seen in the numbers alone, on the CPU.
void check_numbers(const Tensor& factor, const Tensor& unique, const Tensor& inputs, const Tensor& inverse_length,
                   const OptTensor& counts) {
  const double *l = data<double>(factor), *inverse = data<double>(inverse_length);
  const int64_t q = factor.size(0), step = row_step(factor);
  for (int64_t i = 0; i < q; i++)
    check_value(l[i * step + i] > 0 && std::isfinite(l[i * step + i]), "L[", i, ", ", i, "] is ", l[i * step + i],
                "; the diagonal of a Cholesky factor is positive and finite");
  for (int64_t i = 0; counts && i < q; i++)
    check_value(data<int64_t>(*counts)[i] >= 0, "counts[", i, "] is ", data<int64_t>(*counts)[i], "; it must not be negative");
  for (int64_t d = 0; d < inverse_length.numel(); d++)
    check_value(inverse[d] > 0 && std::isfinite(inverse[d]), "length[", d, "] is ", 1 / inverse[d],
                "; it must be finite and positive");
  check_rows_finite(unique, "U");
  check_rows_finite(inputs, "X");
}

}  // namespace

std::tuple<Tensor, Tensor> gp_unique_posterior(const Tensor& factor, const Tensor& weights, const Tensor& unique,
                                               const Tensor& inputs, OptTensor counts, const Tensor& inverse_length,
                                               int64_t kernel, double variance) {
  check_value(kernel >= 0 && kernel < kGpKernels, "kernel is ", kernel, "; accepted: 0 to ", kGpKernels - 1);
  check_value(variance > 0 && std::isfinite(variance), "variance is ", variance, "; it must be finite and positive");
  const OnDevice guard(inputs);
  Tensor l = widened(factor, "L");
  const Tensor a = to_contiguous(widened(weights, "a")), u = to_contiguous(widened(unique, "U"));
  const Tensor x = to_contiguous(widened(inputs, "X")), inverse = to_contiguous(widened(inverse_length, "length"));
  check_value(x.dim() == 2, "X has shape ", shape_text(x), "; expected [M, d]");
  check_value(l.dim() == 2 && l.size(0) == l.size(1), "L has shape ", shape_text(l), "; expected [q, q]");
  const int64_t q = l.size(0), d = x.size(1), candidates = x.size(0);
  check_value(a.dim() == 1 && a.size(0) == q, "a has shape ", shape_text(a), "; expected [", q, "]");
  check_value(u.dim() == 2 && u.size(0) == q && u.size(1) == d, "U has shape ", shape_text(u), "; expected [", q, ", ", d, "]");
  check_value(inverse.dim() == 1 && (inverse.size(0) == 1 || inverse.size(0) == d), "length has shape ", shape_text(inverse),
              "; expected a number, or [", d, "]");
  check_same_device(l, "L", x, "X");
  check_same_device(a, "a", x, "X");
  check_same_device(u, "U", x, "X");
  check_same_device(inverse, "length", x, "X");
  if (counts) {
    check_type(counts->scalar_type() == ScalarType::Long || counts->scalar_type() == ScalarType::Int, "counts has dtype ",
               dtype_name(counts->scalar_type()), "; accepted: int64, int32");
    check_same_device(*counts, "counts", x, "X");
    check_value(counts->dim() == 1 && counts->size(0) == q, "counts has shape ", shape_text(*counts), "; expected [", q, "]");
    counts = to_contiguous(cast(*counts, ScalarType::Long));
  }
  if (!has_plain_rows(l)) l = to_contiguous(l);
  const Tensor mean = empty({candidates}, ScalarType::Double, x), var = empty({candidates}, ScalarType::Double, x);
  GpPosteriorArgs args;
  args.kernel = GpKernel(kernel);
  args.variance = variance;
  args.points = q;
  args.dims = d;
  args.candidates = candidates;
  args.stride = row_step(l);
  args.length_step = inverse.size(0) > 1;
  args.factor = data<double>(l);
  args.weights = data<double>(a);
  args.unique = data<double>(u);
  args.inputs = data<double>(x);
  args.inverse_length = data<double>(inverse);
  args.counts = data_or_null<int64_t>(counts);
  args.mean = mutable_data<double>(mean);
  args.var = mutable_data<double>(var);
  if (x.is_cuda()) {
    check_value(q <= kGpCudaPoints, "L has ", q, " points; on CUDA at most ", kGpCudaPoints, " are accepted");
    check_cuda(cuda_gp_posterior(args, current_stream(x)));
  } else {
    check_numbers(l, u, x, inverse, counts);
    cpu_gp_posterior(args);
  }
  return {mean, var};
}

}  // namespace prefkern
