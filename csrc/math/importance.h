// Weights for tokens that another policy sampled than the one whose log-probs are taken as old ones: the same weights in
// an engine that computes differently. With u = old_logp - rollout_logp of a token, its sum over a sequence, or its mean:
//   w = exp(clamp(u, -C, C)), then truncated to [clip_min, clip_max], or 0 outside of it
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class WeightLevel : int32_t { token, sequence, geometric };
enum class WeightMode : int32_t { truncate, mask };

// Infinity stands for a bound that is not wanted.
struct WeightOptions {
  WeightLevel level = WeightLevel::token;
  WeightMode mode = WeightMode::truncate;
  bool normalize = false;
  double clip_min = -__builtin_inf(), clip_max = 2, log_clamp = 20;
};

inline namespace PK_ISA {

template <class S> struct WeightRule {
  bool truncate;
  S clip_min, clip_max, log_clamp;
};
template <class S> PK_HD WeightRule<S> weight_rule(const WeightOptions& o) {
  return {o.mode == WeightMode::truncate, S(o.clip_min), S(o.clip_max), S(o.log_clamp)};
}

template <class V, class S> PK_HD V importance_weight(const WeightRule<S>& rule, V u) {
  const V c = splat<V>(rule.log_clamp), least = splat<V>(rule.clip_min), most = splat<V>(rule.clip_max);
  const V w = vexp(vmin(c, vmax(-c, u)));  // NaN passes every bound
  return rule.truncate ? vmin(most, vmax(least, w)) : ((w < least) | (w > most) ? splat<V>(0) : w);
}

// The log-ratio of a sequence from the sum over its tokens.
PK_HD double sequence_log_weight(WeightLevel level, double sum, double tokens) {
  return level == WeightLevel::geometric ? sum / (tokens < 1 ? 1 : tokens) : sum;
}

// What weights are multiplied by so that their mean is 1; 1 where they are all but 0.
PK_HD double inverse_mean(double sum, double count) { return count == 0 || sum / count <= 1e-8 ? 1.0 : count / sum; }

// A sequence is dropped if what it teaches to avoid was too unlikely to be sampled: A < 0 and mean(rollout_logp - logp)
// above the threshold. A token that one of the two could not score (NaN) counts as one without mismatch.
template <class V> PK_HD V mismatch(V logp, V rollout_logp) {
  const V x = rollout_logp - logp;
  return x == x ? x : splat<V>(0);
}
PK_HD bool keep_sequence(double advantage, double sum, double tokens, double threshold) {
  return !(advantage < 0 && sum / (tokens < 1 ? 1 : tokens) > threshold);
}

}  // namespace PK_ISA
}  // namespace prefkern
