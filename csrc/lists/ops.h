// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// loss ([], or [B] without a reduction), metrics [kRowMetrics], the gradient of each row before it is divided (shaped like
// scores; no elements unless with_grad), and the inverse of the divisor [].
using RowOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Enumerations of math/lists.h by value. smoothing is negative for a softmax of the labels, norm for the number of lists.
RowOutputs listwise_loss(const Tensor& scores, OptTensor labels, OptTensor mask, OptTensor norm_tensor, int64_t kind,
                         int64_t gain, int64_t rank, bool per_pair, int64_t reduction, double beta, double temperature,
                         double smoothing, double norm, bool with_grad);

RowOutputs group_preference_loss(const Tensor& scores, const Tensor& is_winner, OptTensor mask, OptTensor norm_tensor,
                                 int64_t ddof, bool scale_variance, int64_t reduction, double beta, double lam, double norm,
                                 bool with_grad);

// What `needs` of skew_score may hold: gradients of the row's loss, shaped like v_i, v_j and scales; without one no elements.
// Results are (loss, metrics, those three, inverse).
enum SkewNeed : int64_t { kNeedsLeft = 1, kNeedsRight = 2, kNeedsScales = 4 };
using SkewOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SkewOutputs skew_score(const Tensor& v_i, const Tensor& v_j, OptTensor scales, OptTensor margin, OptTensor norm_tensor,
                       bool normalize, bool with_loss, int64_t reduction, double tau, double norm, int64_t needs);
Tensor skew_row_means(const Tensor& v, OptTensor mask, OptTensor scales, bool normalize, double tau);

// `unnormalised` [rows, columns] times the upstream gradient, [] or [rows], over the divisor.
Tensor preference_rows_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse);

}  // namespace prefkern
