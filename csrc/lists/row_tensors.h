// The tensors of row_loss.h, for the ops of this room.
#pragma once
#include <type_traits>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "lists/ops.h"
#include "lists/row_loss.h"

namespace prefkern {

// Of a type that is computed in.
inline DType computed_dtype(const Tensor& t, const char* name) {
  const DType type = float_dtype(t, name);
  check_type(type == accumulator(type), name, " has dtype ", dtype_name(t.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  return type;
}

inline OptTensor checked_norm(const OptTensor& norm, const Tensor& like, const char* like_name) {
  if (!norm) return norm;
  float_dtype(*norm, "norm");
  check_same_device(*norm, "norm", like, like_name);
  check_value(norm->numel() == 1, "norm has shape ", shape_text(*norm), "; expected one element");
  if (norm->is_cpu()) {
    const double value = data<double>(to_contiguous(cast(*norm, ScalarType::Double)))[0];
    check_value(value >= 0 && value < __builtin_inf(), "norm is ", value, "; it must be finite and not negative");
  }
  return to_contiguous(cast(*norm, like.scalar_type()));
}

// What a reduction needs, and what it results in.
struct RowTensors {
  RowTensors(const Tensor& rows_of, const OptTensor& norm_tensor, const char* rows_name, int64_t rows, int64_t reduction,
             double norm)
      : rows_(rows), norm_(norm), norm_tensor_(checked_norm(norm_tensor, rows_of, rows_name)) {
    check_value(reduction >= 0 && reduction <= 2, "reduction is ", reduction, "; accepted: 0, 1, 2");
    reduction_ = RowReduction(reduction);
    const ScalarType st = rows_of.scalar_type();
    // A CUDA launch without blocks writes nothing.
    const auto make = [&](std::initializer_list<int64_t> shape) {
      return rows ? empty(shape, st, rows_of) : zeros(shape, st, rows_of);
    };
    if (reduction_ == RowReduction::none) losses = make({rows});
    loss = make({});
    metrics = make({kRowMetrics});
    inverse = make({});
    sums_ = rows_of.is_cuda() ? zeros({rows * kRowSums + 1}, ScalarType::Double, rows_of)
                              : empty({rows * kRowSums + 1}, ScalarType::Double, rows_of);
  }

  template <class S> void fill(RowLoss<S>& r) const {
    r.rows = rows_;
    r.reduction = reduction_;
    r.norm = norm_;
    r.norm_tensor = data_or_null<S>(norm_tensor_);
    r.sums = mutable_data<double>(sums_);
    r.losses = losses ? mutable_data<S>(*losses) : nullptr;
    r.loss = mutable_data<S>(loss);
    r.metrics = mutable_data<S>(metrics);
    r.inverse = mutable_data<S>(inverse);
    r.finished = reinterpret_cast<uint32_t*>(r.sums + rows_ * kRowSums);
  }
  const Tensor& result() const { return losses ? *losses : loss; }

  OptTensor losses;
  Tensor loss, metrics, inverse;

 private:
  int64_t rows_;
  RowReduction reduction_;
  double norm_;
  OptTensor norm_tensor_;
  Tensor sums_;
};

}  // namespace prefkern
