// The preference loss of pairs of denoised latents, and its gradient, for the CPU and for CUDA. Formulas: math/diffusion.h. One
// pass over predictions, targets and references; the backward is one elementwise pass over predictions and targets. Beside
// inputs and gradients memory is a few numbers per slice of a pair.
//
// S is the type of results: float for latents of float, bf16 and f16; double for those of double, on the CPU.
#pragma once
#include "diffusion/latents.h"
#include "math/diffusion.h"

namespace prefkern {

template <class S> struct DiffusionPairArgs {
  DiffusionRule rule;
  LatentReduction reduction = LatentReduction::mean;
  DType dtype = DType::f32;
  int64_t pairs = 0, length = 0;  // B, D
  LatentRows pred_w, pred_l, target_w, target_l;
  LatentRows ref_w, ref_l;  // null: ref_error_w and ref_error_l instead
  RowNumbers ref_error_w, ref_error_l;  // mean squared errors of the reference, [B]
  RowNumbers weight;  // [B]; null: 1
  double* sums = nullptr;  // scratch [B, slices, kDiffusionSums]
  S *loss = nullptr, *metrics = nullptr;  // [1], or [B] without a reduction; [kDiffusionMetrics]
  S* slopes = nullptr;  // [B]: the derivative of the pair's loss in the winner's error
  double* errors = nullptr;  // [B] instead of all that, with pred_l null: the winner's error
  uint32_t* finished = nullptr;  // CUDA: a counter that must be 0
};

// grad_w = (pred_w - target_w) 2 slope upstream share / D, grad_l likewise with the other sign.
template <class S> struct DiffusionGradArgs {
  DType dtype = DType::f32;
  int64_t pairs = 0, length = 0;
  LatentRows pred_w, pred_l, target_w, target_l;
  bool per_pair = false;
  double share = 1;  // 1 / B for a mean
  const S *slopes = nullptr, *upstream = nullptr;  // [B]; [B] or [1]
  void *grad_w = nullptr, *grad_l = nullptr;  // [B, D] of the latents' type; null when not wanted
};

PK_API void cpu_diffusion_pairs(const DiffusionPairArgs<float>& args);
PK_API void cpu_diffusion_pairs(const DiffusionPairArgs<double>& args);
PK_API void cpu_diffusion_pairs_backward(const DiffusionGradArgs<float>& args);
PK_API void cpu_diffusion_pairs_backward(const DiffusionGradArgs<double>& args);

// Enqueue; return a cudaError_t.
PK_API int cuda_diffusion_pairs(const DiffusionPairArgs<float>& args, void* stream);
PK_API int cuda_diffusion_pairs_backward(const DiffusionGradArgs<float>& args, void* stream);

inline namespace PK_ISA {

// A pair whose sums are known.
template <class S> struct PairResult {
  DiffusionTerm term;
  double errors[4];  // of the policy and of the reference, winner and loser each
};
template <class S> PK_HD PairResult<S> pair_result(const DiffusionPairArgs<S>& a, int64_t b,
                                                   const double (&sums)[kDiffusionSums]) {
  const double d = double(a.length), m_w = sums[kSquareW] / d, m_l = sums[kSquareL] / d;
  double change_w, change_l, r_w, r_l;
  if (a.ref_w.data) {
    change_w = sums[kChangeW] / d, change_l = sums[kChangeL] / d;
    r_w = m_w - change_w, r_l = m_l - change_l;
  } else {
    r_w = row_number(a.ref_error_w, b, 0), r_l = row_number(a.ref_error_l, b, 0);
    change_w = m_w - r_w, change_l = m_l - r_l;
  }
  const double weight = row_number(a.weight, b, 1);
  const double invalid = nan_unless_finite(m_w) + nan_unless_finite(m_l) + nan_unless_finite(change_w) +
                         nan_unless_finite(change_l) + nan_unless_finite(weight);
  return {diffusion_term(a.rule, change_w + invalid, change_l, weight), {m_w, m_l, r_w, r_l}};
}

// Added up over pairs.
struct PairTotals {
  double loss = 0, metrics[kDiffusionMetrics] = {};
};
template <class S> PK_HD void add_pair(PairTotals& t, const PairResult<S>& r) {
  t.loss += r.term.loss;
  t.metrics[kMargin] += r.term.margin;
  t.metrics[kMarginAccuracy] += r.term.margin > 0 ? 1.0 : 0.0;
  for (int k = 0; k < 4; k++) t.metrics[kErrorW + k] += r.errors[k];
}
template <class S> PK_HD void finish_pairs(const DiffusionPairArgs<S>& a, const PairTotals& t) {
  const double pairs = double(a.pairs);
  if (a.reduction != LatentReduction::none) *a.loss = S(a.reduction == LatentReduction::mean ? t.loss / pairs : t.loss);
  for (int k = 0; k < kDiffusionMetrics; k++) a.metrics[k] = S(t.metrics[k] / pairs);
}

template <class S> PK_HD double gradient_factor(const DiffusionGradArgs<S>& a, int64_t b) {
  const double slope = double(a.slopes[b]);
  if (slope == 0) return 0;  // whatever comes from upstream
  return slope * double(a.upstream[a.per_pair ? b : 0]) * a.share * 2 / double(a.length);
}

}  // namespace PK_ISA
}  // namespace prefkern
