// Group advantages as sums over pairs, without the pairs of samples that are too alike:
//   A_i = 1 / G sum_j W_ij (r_i - r_j) / (sigma + eps), W_ij = 1 where r_i = r_j, else pair_counts
// or, with `whole_samples`, all pairs of those samples of which a pair counts. O(G^2) time, O(B) memory.
//
// S is the element type: float, or double on the CPU. Sums are in double either way.
#pragma once
#include "core/common.h"
#include "math/advantages.h"

namespace prefkern {

template <class S> struct MaskedPairArgs {
  int64_t count = 0;  // B
  double tau = 0.1, eps = 1e-6;
  int32_t ddof = 1;
  PairMode mode = PairMode::gap;
  bool whole_samples = false;        // a sample is masked, not a pair
  bool sigma_of_kept = false;        // sigma of the rewards of kept samples; 1 if they are fewer than two
  bool renormalise = false;          // times B / samples that are not masked out
  const S *rewards = nullptr, *scores = nullptr;  // [B]
  const int64_t* group = nullptr;    // ids; on CUDA with `order`: sorted
  const int64_t* order = nullptr;    // CUDA: row of each sorted id; null: ids are in the order of the rows
  double* values = nullptr;          // [B], scratch
  S* advantages = nullptr;           // [B]
  uint8_t* kept = nullptr;           // [B], bool: a pair of different rewards is left
  int64_t* masked = nullptr;         // [B]: pairs that the sample lost
};

inline namespace PK_ISA {
// A sample's sum of differences over its group, and what it is divided by.
PK_HD double pair_advantage(double sum, double n, double sigma, double eps) { return sum == 0 ? 0.0 : sum / n / (sigma + eps); }
PK_HD double kept_sigma(double n, double squares, double ddof) { return n < 2 ? 1.0 : vsqrt(squares / freedom(n, ddof)); }
// Of all samples: what is left, as a factor.
PK_HD double renormalisation(double count, double masked_out) {
  const double left = count - masked_out;
  return count / (left > 1 ? left : 1.0);
}
}  // namespace PK_ISA

PK_API void cpu_masked_pairs(const MaskedPairArgs<float>& args);
PK_API void cpu_masked_pairs(const MaskedPairArgs<double>& args);

// Enqueue on `stream`; returns a cudaError_t. Groups with a number that is not finite come out NaN.
PK_API int cuda_masked_pairs(const MaskedPairArgs<float>& args, void* stream);

}  // namespace prefkern
