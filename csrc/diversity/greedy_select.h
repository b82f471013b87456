// Sets of candidates that are unlike each other, one per seed, each type of candidate having a quota; for the CPU and for CUDA.
//
// The first chosen is the seed. A candidate's score is the least (`maximum`: the largest) of its cosines with those chosen so
// far; next comes the lowest score among candidates whose type has room, of equal ones the first. The matrix of cosines is not
// formed: per step one product of the candidates with the vector that was chosen last.
//
// A cosine is (sum_k x_k u_k) / |x|, u being the chosen vector over its norm. The sum is made of 32, of every 32nd element each,
// joined two by two, and products are rounded before they are added: the same bits on every device and instruction set.
//
// S is the type of a score: float, or double for a double embedding, on the CPU. Formulas: math/diversity.h.
#pragma once
#include "core/common.h"

namespace prefkern {

constexpr int kGreedySums = 32;
constexpr int64_t kMostTypes = 256;

template <class S> struct GreedyArgs {
  int64_t seeds = 0, candidates = 0, width = 0, types = 0;  // Q, K, d, C
  int64_t size = 0;  // columns of the result
  bool maximum = false;
  DType dtype = DType::f32;  // of the embeddings
  bool own_embeddings = false, own_types = false, own_quotas = false;  // one per seed, else one for all
  const void* embeddings = nullptr;  // [Q, K, d] or [K, d]
  const int64_t* type_id = nullptr;  // [Q, K] or [K]
  const int64_t* seed = nullptr;  // [Q]
  const int64_t* quotas = nullptr;  // [Q, C] or [C]
  S* inverse_norms = nullptr;  // [Q, K] or [K], scratch; NaN where there is none (inverse_norm)
  S* scores = nullptr;  // [Q, K], scratch
  int64_t* chosen = nullptr;  // [Q, size]; -1 behind the last
};

PK_API void cpu_greedy_norms(const GreedyArgs<float>& args);
PK_API void cpu_greedy_norms(const GreedyArgs<double>& args);
// After the norms. Every seed, type, quota and norm must be valid, and of each type there must be as many as its quota.
PK_API void cpu_greedy_select(const GreedyArgs<float>& args);
PK_API void cpu_greedy_select(const GreedyArgs<double>& args);

// Both; enqueues, returns a cudaError_t. Where one of those conditions does not hold, the seed's row is -1 all over.
PK_API int cuda_greedy_select(const GreedyArgs<float>& args, void* stream);

}  // namespace prefkern
