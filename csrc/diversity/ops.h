// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// float64 [P] each, on the CPU. cu_prompts int32 [P + 1]: where the responses of each prompt begin; none: one prompt. weights:
// float64, on the CPU.
Tensor self_bleu(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, const Tensor& weights,
                 double smoothing);
Tensor distinct_n(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, int64_t n);
Tensor edit_distance(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, bool normalize);

// int64 [Q, size]: the chosen of each seed, -1 behind the last.
Tensor greedy_select(const Tensor& emb, const Tensor& type_id, const Tensor& seeds, const Tensor& quotas, int64_t size,
                     bool maximum);

}  // namespace prefkern
