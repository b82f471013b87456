// Reductions over the rows of a group, the loss of a pair of rows, and normalisation within a group. All in double.
//
// reduce     sum, mean, minimum, maximum, log-sum-exp or number of the rows that count. NaN among them shows in all but
//            the number.
// pairs      For a winner i and a loser j with scores h: margin m = k_i h_i - k_j h_j, loss softplus(-m), and
//            dloss/dm = -sigmoid(-m). k = beta, or beta times the anisotropy: at level 1, the best, of the score itself
//            (per response) or, of both scores, at the winner's.
// normalise  z = (x - m) / (s + eps) with the group's mean m and standard deviation s (divisor n - ddof), and
//            dL/dx_j = (g_j - mean(g) - slope z_j sum(g z)) / (s + eps), where slope = (s + eps) / ((n - ddof) s), or 0 if
//            s is a constant. Where all x are equal z = 0 and s is a constant; if eps is 0 too there is no gradient.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class GroupReduction : int32_t { sum = 0, mean = 1, min = 2, max = 3, logsumexp = 4, count = 5 };

struct PairRule {
  double beta = 0.1, anisotropy = 2.5;
  bool per_response = false;
};

struct NormalizeRule {
  double eps = 0;
  int64_t ddof = 1;
  bool sigma_grad = false;
};

inline namespace PK_ISA {

// ---- reduce: what a first look at the rows gives ----------------------------------------------------------------------
struct GroupFold {
  double n = 0, nans = 0, sum = 0, min = __builtin_inf(), max = -__builtin_inf();
};
PK_HD void fold(GroupFold& f, double v) {
  f.n += 1;
  f.nans += v != v;
  f.sum += v;
  f.min = vmin(v, f.min);  // passes over NaN
  f.max = vmax(v, f.max);
}
PK_HD bool finite(double x) { return x - x == 0; }

// A second look adds up second_term: deviations from the mean, which correct it so that equal rows have exactly their own
// value as mean, or exponentials relative to the maximum.
PK_HD bool needs_second_look(GroupReduction r) { return r == GroupReduction::mean || r == GroupReduction::logsumexp; }
PK_HD double fold_center(GroupReduction r, const GroupFold& f) {
  if (r == GroupReduction::mean) return f.n == 0 ? 0.0 : f.sum / f.n;
  return finite(f.max) ? f.max : 0.0;
}
PK_HD double second_term(GroupReduction r, double center, double v) {
  return r == GroupReduction::mean ? v - center : vexp(v - center);
}
PK_HD double reduced(GroupReduction r, const GroupFold& f, double center, double second) {
  const double nan = f.nans > 0 ? f.sum : 0.0;  // the sum is NaN then
  switch (r) {
    case GroupReduction::sum: return f.sum;
    case GroupReduction::mean: return f.n == 0 ? 0.0 : finite(center) ? center + second / f.n : center;
    case GroupReduction::min: return f.min + nan;
    case GroupReduction::max: return f.max + nan;
    case GroupReduction::logsumexp: return center + vlog(second);
    case GroupReduction::count: return f.n;
  }
  return nan;
}

// ---- pairs ------------------------------------------------------------------------------------------------------------
struct PairTerm {
  double loss, winner_grad, loser_grad;  // derivatives in the scores
};
PK_HD double pair_weight(const PairRule& rule, int64_t level) { return level == 1 ? rule.beta * rule.anisotropy : rule.beta; }
PK_HD PairTerm pair_term(const PairRule& rule, double winner, int64_t winner_level, double loser, int64_t loser_level) {
  const double k = pair_weight(rule, winner_level);
  const double loser_k = rule.per_response ? pair_weight(rule, loser_level) : k;
  const double margin = rule.per_response ? k * winner - loser_k * loser : k * (winner - loser);
  const double e = vexp(margin > 0 ? -margin : margin);  // never above 1
  const double loss = (margin > 0 ? 0.0 : -margin) + vlog1p(e);
  const double slope = (margin > 0 ? e : 1.0) / (1 + e);  // sigmoid(-margin)
  return {loss, -slope * k, slope * loser_k};
}
// A level below 1 is refused where it can be seen in time; here it makes the score, and all that comes of it, NaN.
PK_HD double pair_score(double score, int64_t level) { return level < 1 ? double(__builtin_nanf("")) : score; }

PK_HD double pair_mean(double sum, double pairs) { return pairs == 0 ? 0.0 * sum : sum / pairs; }
PK_HD double pair_grad(double unnormalised, double upstream, double pairs) {
  return pairs == 0 || unnormalised == 0 ? 0.0 * unnormalised : unnormalised * (upstream / pairs);
}

// ---- normalise ----------------------------------------------------------------------------------------------------------
struct Normalizer {
  double mean, scale, slope;
};
PK_HD Normalizer normalizer(const NormalizeRule& rule, double n, double mean, double sum_sq_deviations) {
  const double others = n > double(rule.ddof) ? n - double(rule.ddof) : 1.0;
  const double s = vsqrt(sum_sq_deviations / others), divisor = s + rule.eps;
  const double slope = rule.sigma_grad && sum_sq_deviations > 0 ? divisor / (others * s) : 0.0;
  return {mean, divisor == 0 ? 0.0 : 1 / divisor, slope};
}
PK_HD double normalized(const Normalizer& g, double x) { return (x - g.mean) * g.scale; }
PK_HD double normalize_grad(double grad, double z, double scale, double slope, double mean_grad, double sum_grad_z) {
  return scale * (grad - mean_grad - slope * z * sum_grad_z);
}

}  // namespace PK_ISA
}  // namespace prefkern
