// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// Which gradients are wanted, as bits; results without one have no elements.
enum LpgNeed : int64_t { kNeedsProbs = 1, kNeedsY = 2, kNeedsAdjustment = 4, kNeedsTarget = 8 };

// probs [N, A], actions int64 [N], y and y_hat [N, W], pi_hat [N]. loss [], and the means of its two terms, [2].
std::tuple<Tensor, Tensor> lpg_inner_loss(const Tensor& probs, const Tensor& actions, const Tensor& y, const Tensor& pi_hat,
                                          const Tensor& y_hat, double alpha, double sign);
// By probs, y, pi_hat and y_hat.
std::tuple<Tensor, Tensor, Tensor, Tensor> lpg_inner_loss_backward(const Tensor& g, const Tensor& probs, const Tensor& actions,
                                                                   const Tensor& y, const Tensor& pi_hat, const Tensor& y_hat,
                                                                   double alpha, double sign, int64_t needs);
// Of the sum of those four times `above`: by g, probs, y, pi_hat and y_hat.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lpg_inner_loss_second(OptTensor above_probs, OptTensor above_y,
                                                                         OptTensor above_pi_hat, OptTensor above_y_hat,
                                                                         const Tensor& g, const Tensor& probs,
                                                                         const Tensor& actions, const Tensor& y,
                                                                         const Tensor& pi_hat, const Tensor& y_hat,
                                                                         double alpha, double sign, int64_t needs);

// gates [B, T, 3H] in the order r, z, n; done bool [B, T]; weight [3H, H]; bias [H]. States [B, T, H] and, for the backward, what it
// needs of the gates [B, T, 4H]; no elements unless with_grad.
std::tuple<Tensor, Tensor> reverse_gru(const Tensor& gates, OptTensor done, const Tensor& weight, const Tensor& bias,
                                       bool with_grad);
// By gates, weight and bias.
std::tuple<Tensor, Tensor, Tensor> reverse_gru_backward(const Tensor& grad, const Tensor& states, const Tensor& saved,
                                                        OptTensor done, const Tensor& weight, bool needs_weights);

}  // namespace prefkern
