// Latents and numbers per row as kernels take them, checked, for the ops of this room.
#pragma once
#include <deque>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "diffusion/latents.h"
#include "diffusion/ops.h"
#include "math/diffusion.h"

namespace prefkern {

// Of a call, told by its first tensor of latents. Keeps alive what it points to: must outlive the launch.
class LatentTensors {
 public:
  LatentTensors(const Tensor& first, const char* name) : first_(first), name_(name), dtype_(float_dtype(first, name)) {
    check_value(first.dim() == 2, name, " has shape ", shape_text(first), "; expected [B, D]");
    check_value(first.size(0) > 0, name, " has shape ", shape_text(first), "; empty batch");
    check_value(first.size(1) > 0, name, " has shape ", shape_text(first), "; latents without elements");
  }

  DType dtype() const { return dtype_; }
  bool wide() const { return dtype_ == DType::f64; }
  int64_t rows() const { return first_.size(0); }
  int64_t length() const { return first_.size(1); }
  ScalarType result_type() const { return wide() ? ScalarType::Double : ScalarType::Float; }
  Tensor result(int64_t reduction) const {
    return LatentReduction(reduction) == LatentReduction::none ? empty({rows()}, result_type(), first_)
                                                               : empty({}, result_type(), first_);
  }
  Tensor scratch(int64_t per_slice) const {  // and a counter
    const int64_t count = rows() * ceil_div(length(), first_.is_cuda() ? kCudaSlice : kCpuSlice) * per_slice + 1;
    return first_.is_cuda() ? zeros({count}, ScalarType::Double, first_) : empty({count}, ScalarType::Double, first_);
  }

  LatentRows latents(const Tensor& t, const char* name) {
    check_type(t.scalar_type() == first_.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()), "; that of ", name_,
               ", ", dtype_name(first_.scalar_type()), ", is expected");
    check_same_device(t, name, first_, name_);
    check_value(same_shape(t, first_), name, " has shape ", shape_text(t), "; ", name_, " has shape ", shape_text(first_),
                ", so the same is expected");
    const bool adjacent = t.stride(1) == 1 || t.size(1) == 1;
    const Tensor& kept = kept_.emplace_back(adjacent ? t : torch::stable::contiguous(t));
    return {kept.const_data_ptr(), kept.stride(0)};
  }
  LatentRows latents(const OptTensor& t, const char* name) { return t ? latents(*t, name) : LatentRows(); }

  // [B]; on the CPU all must be finite.
  RowNumbers numbers(const OptTensor& t, const char* name) {
    if (!t) return {};
    float_dtype(*t, name);
    check_same_device(*t, name, first_, name_);
    check_value(t->dim() == 1 && t->size(0) == rows(), name, " has shape ", shape_text(*t), "; expected [", rows(), "]");
    const bool double_ = t->scalar_type() == ScalarType::Double;
    const Tensor& kept = kept_.emplace_back(to_contiguous(double_ ? *t : cast(*t, ScalarType::Float)));
    const RowNumbers numbers{kept.const_data_ptr(), double_};
    if (first_.is_cpu())
      for (int64_t b = 0; b < rows(); b++) {
        const double value = row_number(numbers, b, 0);
        check_value(value - value == 0, name, "[", b, "] is ", value, "; it must be finite");
      }
    return numbers;
  }

  // float64 [terms, B], already on the device of the latents.
  const double* coefficients(const Tensor& t, int64_t terms) {
    check_type(t.scalar_type() == ScalarType::Double, "coefficients has dtype ", dtype_name(t.scalar_type()),
               "; accepted: float64");
    check_same_device(t, "coefficients", first_, name_);
    check_value(t.dim() == 2 && t.size(0) == terms && t.size(1) == rows(), "coefficients has shape ", shape_text(t),
                "; expected [", terms, ", ", rows(), "]");
    return data<double>(kept_.emplace_back(to_contiguous(t)));
  }

  // Of the type of results: the gradient of a loss, or without a reduction a number per row.
  template <class S> const S* upstream(const Tensor& g, int64_t reduction, const char* name = "g_loss") {
    const bool per_row = LatentReduction(reduction) == LatentReduction::none;
    check_type(g.scalar_type() == result_type(), name, " has dtype ", dtype_name(g.scalar_type()), "; expected ",
               dtype_name(result_type()));
    check_same_device(g, name, first_, name_);
    check_value(per_row ? g.dim() == 1 && g.size(0) == rows() : g.dim() == 0, name, " has shape ", shape_text(g), "; expected ",
                per_row ? "one number per row" : "[]");
    return data<S>(kept_.emplace_back(to_contiguous(g)));
  }

 private:
  const Tensor& first_;
  const char* name_;
  DType dtype_;
  std::deque<Tensor> kept_;  // references to what it holds stay valid
};

inline void check_reduction(int64_t reduction) {
  check_value(reduction >= 0 && reduction < kLatentReductions, "reduction is ", reduction, "; accepted: 0 to ",
              kLatentReductions - 1);
}

}  // namespace prefkern
