// chol_append_ and chol_rank1_: a Cholesky factor kept up to date in place.
#include "core/cuda_runtime.h"
#include "gaussian/chol.h"
#include "gaussian/gaussian_tensors.h"
#include "gaussian/ops.h"

namespace prefkern {
namespace {

// Of a factor of which `size` rows exist and `needed` have room.
void check_factor(const Tensor& factor, int64_t size, int64_t needed) {
  check_type(factor.scalar_type() == ScalarType::Double, "factor has dtype ", dtype_name(factor.scalar_type()),
             "; it is changed in place, so float64 is expected");
  check_value(factor.dim() == 2, "factor has shape ", shape_text(factor), "; expected [rows, columns]");
  check_value(has_plain_rows(factor), "factor has strides ", factor.stride(0), ", ", factor.stride(1),
              "; the numbers of a row must be adjacent: take factor.contiguous()");
  check_value(size >= 0 && factor.size(0) >= needed && factor.size(1) >= needed, "size is ", size, " and factor has shape ",
              shape_text(factor), "; it must have room for ", needed, " rows and columns");
  if (factor.is_cuda())
    check_value(needed <= kCholCudaPoints, "size is ", size, "; on CUDA at most ", kCholCudaPoints, " rows are accepted");
  if (!factor.is_cpu()) return;
  const double* l = data<double>(factor);
  const int64_t step = row_step(factor);
  for (int64_t i = 0; i < size; i++)
    check_value(l[i * step + i] > 0 && std::isfinite(l[i * step + i]), "factor[", i, ", ", i, "] is ", l[i * step + i],
                "; the diagonal of a Cholesky factor is positive and finite");
}

Tensor checked_vector(const Tensor& t, const char* name, const Tensor& factor, int64_t length) {
  const Tensor v = to_contiguous(widened(t, name));
  check_same_device(v, name, factor, "factor");
  check_value(v.dim() == 1 && v.size(0) == length, name, " has shape ", shape_text(v), "; expected [", length, "]");
  return v;
}

CholArgs arguments(const Tensor& factor, const Tensor& vector, const Tensor& pivot, int64_t size) {
  CholArgs a;
  a.size = size;
  a.stride = row_step(factor);
  a.factor = mutable_data<double>(factor);
  a.vector = data<double>(vector);
  a.pivot = mutable_data<double>(pivot);
  return a;
}

}  // namespace

Tensor chol_append(Tensor factor, const Tensor& row, int64_t size) {
  check_factor(factor, size, size + 1);
  const OnDevice guard(factor);
  const Tensor vector = checked_vector(row, "row", factor, size + 1), pivot = empty({}, ScalarType::Double, factor);
  const CholArgs a = arguments(factor, vector, pivot, size);
  if (factor.is_cuda()) {
    check_cuda(cuda_chol_append(a, current_stream(factor)));
  } else {
    cpu_chol_append(a);
    check_value(*a.pivot > 0 && std::isfinite(*a.pivot), "row makes the matrix indefinite: its pivot is ", *a.pivot,
                "; it must be finite and positive");
  }
  return pivot;
}

Tensor chol_rank1(Tensor factor, const Tensor& vector, double sigma, int64_t size) {
  if (size < 0 && factor.dim() == 2) size = factor.size(0);
  check_factor(factor, size, size);
  check_value(std::isfinite(sigma), "sigma is ", sigma, "; it must be finite");
  const OnDevice guard(factor);
  const Tensor w = checked_vector(vector, "vector", factor, size), pivot = empty({}, ScalarType::Double, factor);
  CholArgs a = arguments(factor, w, pivot, size);
  a.sigma = sigma;
  if (factor.is_cuda()) {
    check_cuda(cuda_chol_rank1(a, current_stream(factor)));
  } else {
    cpu_chol_rank1(a);
    check_value(*a.pivot > 0 && (std::isfinite(*a.pivot) || size == 0),
                "vector makes the matrix indefinite: its smallest pivot is ", *a.pivot, "; it must be finite and positive");
  }
  return pivot;
}

}  // namespace prefkern
