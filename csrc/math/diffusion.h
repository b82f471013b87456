// Losses of diffusion and flow models: of pairs of denoised latents, and of predicted clean latents.
//
// Of a side of a pair, with prediction p, target t and reference r of D elements each:
//   m = mean (p - t)^2, the reference's r = mean (r - t)^2, and what the policy changes, d = m - r = mean (p - r)((p - t) + (r - t)).
// The last form is what is added up where there is a reference: m and r are large and nearly equal, and their difference is lost
// if it is taken of sums. It is 0, exactly, where the policy is the reference.
// With g = s w (d_l - d_w), w the weight of the pair and s = -1 where winner and loser are exchanged, else 1, and z = f g:
//   sigmoid -log sigmoid(z);  hinge max(0, 1 - z);  ipo (g - 1 / (2 beta))^2;  margin z
// Of a clean latent x0 = (x - sigma e) / alpha told by a prediction e, with y = x0 - target:
//   huber sqrt(y^2 + c^2) - c = y^2 / (sqrt(y^2 + c^2) + c);  l2 y^2
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "math/exponential.h"
#include "core/elementary_more.h"

namespace prefkern {

enum class DiffusionKind : int32_t { sigmoid, hinge, ipo, margin };
enum class X0Kind : int32_t { huber, l2 };
enum class LatentReduction : int32_t { mean, sum, none };

constexpr int32_t kDiffusionKinds = 4, kX0Kinds = 2, kLatentReductions = 3;

// factor: f above.
struct DiffusionRule {
  DiffusionKind kind = DiffusionKind::sigmoid;
  double beta = 1, factor = 1;
  bool negative = false;
};

// Of a pair and a slice of its elements: the sums of (p - t)^2 and of what a mean of them is d above, of winner and loser.
enum DiffusionSum : int { kSquareW, kChangeW, kSquareL, kChangeL, kDiffusionSums };
// Metrics, means over pairs, in the order in which they are returned: z, or g for ipo, the share of them above 0, and the errors.
enum DiffusionMetric : int { kMargin, kMarginAccuracy, kErrorW, kErrorL, kRefErrorW, kRefErrorL, kDiffusionMetrics };

inline namespace PK_ISA {

// The summand of d, from d = p - t.
template <class V> PK_HD V error_change(V pred, V ref, V target, V d) { return (pred - ref) * (d + (ref - target)); }

// slope: the derivative of the loss in m of the winner; that in m of the loser is its opposite.
struct DiffusionTerm {
  double loss, margin, slope;
};

PK_HD DiffusionTerm diffusion_term(const DiffusionRule& rule, double change_w, double change_l, double weight) {
  const double signed_weight = rule.negative ? -weight : weight;
  const double g = signed_weight * (change_l - change_w), factor = rule.kind == DiffusionKind::ipo ? 1 : rule.factor;
  const double z = factor * g;
  double loss = z, dz = 1;
  switch (rule.kind) {
    case DiffusionKind::sigmoid: {
      const Logistic<double> l = logistic(z);
      loss = l.nll;
      dz = -l.p;
      break;
    }
    case DiffusionKind::hinge:
      loss = vmax(0.0, 1 - z);
      dz = z < 1 ? -1.0 : z == z ? 0.0 : z;
      break;
    case DiffusionKind::ipo: {
      const double away = g - 1 / (2 * rule.beta);
      loss = away * away;
      dz = 2 * away;
      break;
    }
    case DiffusionKind::margin: break;
  }
  return {loss, z, -(signed_weight * factor) * dz};
}

// 0, or NaN where x is not finite: an infinite error must not end as a loss of 0.
PK_HD double nan_unless_finite(double x) { return x - x; }

template <class V, class S> PK_HD V x0_loss(X0Kind kind, V y, S c) {
  if (kind == X0Kind::l2) return y * y;
  return y * y / (sqrt_any(y * y + c * c) + c);
}
template <class V, class S> PK_HD V x0_slope(X0Kind kind, V y, S c) {
  if (kind == X0Kind::l2) return y * S(2);
  return y / sqrt_any(y * y + c * c);
}

}  // namespace PK_ISA
}  // namespace prefkern
