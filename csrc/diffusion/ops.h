// Operators of this room, as registered in library.cpp. Latents are [B, D]; a copy is made of those whose rows are not adjacent
// elements, wherever the rows themselves lie.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// loss ([], or [B] without a reduction), metrics [kDiffusionMetrics], slopes [B]: float32, or float64 for float64. target_l: None for
// target. Either ref_w and ref_l, or ref_error_w and ref_error_l [B]. Enumerations of math/diffusion.h by value.
std::tuple<Tensor, Tensor, Tensor> diffusion_pair_loss(const Tensor& pred_w, const Tensor& pred_l, const Tensor& target,
                                                       OptTensor target_l, OptTensor ref_w, OptTensor ref_l,
                                                       OptTensor ref_error_w, OptTensor ref_error_l, OptTensor weight,
                                                       int64_t kind, int64_t reduction, double beta, double factor,
                                                       bool negative);

// What `needs` may hold; the gradients, [number of them, B, D], lie one behind the other.
enum DiffusionNeed : int64_t { kNeedsWinner = 1, kNeedsLoser = 2 };
Tensor diffusion_pair_loss_backward(const Tensor& g_loss, const Tensor& slopes, const Tensor& pred_w, const Tensor& pred_l,
                                    const Tensor& target, OptTensor target_l, int64_t reduction, int64_t needs);

Tensor diffusion_mse(const Tensor& pred, const Tensor& target);  // [B], float64

// coefficients: float64 [2, B], of x and of pred.
Tensor x0_loss(const Tensor& pred, const Tensor& x, const Tensor& target, const Tensor& coefficients, int64_t kind,
               int64_t reduction, double c);
Tensor x0_loss_backward(const Tensor& g_loss, const Tensor& pred, const Tensor& x, const Tensor& target,
                        const Tensor& coefficients, int64_t kind, int64_t reduction, double c);

// coefficients: float64 [3, B], of x, e1 and e2; [2, B] without e2.
Tensor ddim_invert_step(const Tensor& x, const Tensor& e1, OptTensor e2, const Tensor& coefficients);

}  // namespace prefkern
