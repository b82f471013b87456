// Loss of preference pairs, or of single judged responses, in one pass, for the CPU and for CUDA: loss, metrics and, where
// asked for, the derivatives before the division by the norm, which is only known at the end. The backward is then one
// elementwise pass. Formulas: math/preference.h.
//
// Sums are formed over blocks of pairs and added in a fixed order, so results do not depend on threads.
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/preference.h"

namespace prefkern {

// Which of the arrays that may be a single number have one value per pair.
enum PairEach : int64_t {
  kEachScale = 1,
  kEachOffset = 2,
  kEachSmoothing = 4,
  kEachChosenTarget = 8,
  kEachRejectedTarget = 16
};

// Of single responses only what is chosen_* is looked at, and `desirable` says which side each one is on.
template <class S> struct PreferenceArgs {
  PreferenceOptions options;
  PairReduction reduction = PairReduction::mean;
  int64_t pairs = 0;
  const S *chosen = nullptr, *rejected = nullptr, *ref_chosen = nullptr,
          *ref_rejected = nullptr;  // [pairs]; a reference may be null
  const S *chosen_length = nullptr, *rejected_length = nullptr;  // null unless options.average
  // One value, or one per pair as `each` says; null: that of the options.
  const S *scale = nullptr, *offset = nullptr, *smoothing = nullptr, *chosen_target = nullptr, *rejected_target = nullptr;
  int64_t each = 0;
  const S* weight = nullptr;  // [pairs]; null: 1
  const uint8_t* tie = nullptr;  // [pairs]
  const uint8_t* desirable = nullptr;  // [pairs]; null: these are pairs
  const uint8_t* mask = nullptr;  // [pairs], 0 = does not count; null = all count
  const S* norm = nullptr;  // [1], in place of `given_norm`
  double given_norm = -1;  // negative: the count
  S* losses = nullptr;  // [pairs], for PairReduction::none
  S* grads = nullptr;  // [2, pairs], of single responses [pairs], unnormalised; null when not wanted
  S *loss = nullptr, *metrics = nullptr, *inverse_norm = nullptr;  // [1] (null if `losses` is not), [kPreferenceMetrics], [1]
  // CUDA: [blocks, kPreferenceSums] sums, and a counter that must be 0.
  float* partials = nullptr;
  uint32_t* finished = nullptr;
};

template <class S> struct PreferenceGradArgs {
  int64_t pairs = 0, sides = 2;
  bool vector = false;  // whether upstream has one value per pair
  const S *unnormalised = nullptr, *upstream = nullptr, *inverse_norm = nullptr;  // [sides, pairs], [1] or [pairs], [1]
  S* grad = nullptr;
};

constexpr int64_t kPairsPerBlock = 256;  // on CUDA
inline int64_t preference_blocks(int64_t pairs) {
  const int64_t wanted = ceil_div(pairs, kPairsPerBlock);
  return wanted < 1024 ? wanted : 1024;
}

PK_API void cpu_preference_loss(const PreferenceArgs<float>& args);
PK_API void cpu_preference_loss(const PreferenceArgs<double>& args);
PK_API void cpu_preference_loss_backward(const PreferenceGradArgs<float>& args);
PK_API void cpu_preference_loss_backward(const PreferenceGradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. Smoothing outside its range, a length of 0 and a norm that is none come out NaN.
PK_API int cuda_preference_loss(const PreferenceArgs<float>& args, void* stream);
PK_API int cuda_preference_loss_backward(const PreferenceGradArgs<float>& args, void* stream);

inline namespace PK_ISA {
template <class S> PK_HD double norm_of(const PreferenceArgs<S>& a, const double* sums) {
  return preference_norm(a.reduction, sums, a.norm || a.given_norm >= 0, a.norm ? double(*a.norm) : a.given_norm);
}
}  // namespace PK_ISA

}  // namespace prefkern
