// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// loss [] (or [P] with reduction none), metrics [kPreferenceMetrics], the derivatives before the division by the norm, [2, P]
// or [1, P] (no elements unless with_grad), and its inverse []. With `desirable` the rows are single responses: there is no
// `rejected`, and kind is an UnpairedKind.
using PreferenceOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
PreferenceOutputs preference_loss(const Tensor& chosen, OptTensor rejected, OptTensor ref_chosen, OptTensor ref_rejected,
                                  OptTensor desirable, OptTensor chosen_lengths, OptTensor rejected_lengths, OptTensor scale,
                                  OptTensor offset, OptTensor smoothing, OptTensor chosen_target, OptTensor rejected_target,
                                  OptTensor weight, OptTensor tie, OptTensor mask, OptTensor norm_tensor, int64_t kind,
                                  int64_t score, int64_t average, int64_t reduction, double beta, double rejected_beta,
                                  double chosen_reward, double rejected_reward, double scale_number, double offset_number,
                                  double smoothing_number, double chosen_target_number, double rejected_target_number,
                                  double alpha, double exp_cap, double max_p, double parameter, double clip, double factor,
                                  double chosen_weight, double rejected_weight, double norm, bool with_grad);
Tensor preference_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm);
void preference_loss_backward_inplace(const Tensor& g_loss, Tensor unnormalised, const Tensor& inverse_norm);

// [P]: how likely each label is right, from margins [P], reliabilities [K] and ids of annotators [P].
Tensor label_posterior(const Tensor& margin, const Tensor& reliability, OptTensor annotator);

}  // namespace prefkern
