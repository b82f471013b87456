// The CPU walk of token_loss.h: one sequence after the other, a vector of tokens at a time.
//
// The mask of a sequence is counted first. That gives the weight its tokens need, skips sequences without tokens, and
// frees those without padding from the mask. Inside, a vector of tokens that all count takes no select at all, one of
// which none counts is not even loaded. Sums stay in registers for a tile and are then added in double, so that long
// sequences lose nothing.
#include "policy/token_loss_cpu.h"

#include "core/mask.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kTile = 4096;

PK_HD double lane_min(double v) { return v; }
PK_HD double lane_min(VecF v) { return -reduce_max(-v); }

// How many lanes of a tile have met a condition: -1 in a lane of a vector, true of a double.
PK_HD void count(VecI& counts, VecI condition) { counts -= condition; }
PK_HD void count(int32_t& counts, bool condition) { counts += condition; }
PK_HD double counted(VecI counts) {
  int32_t n = 0;
  for (int i = 0; i < kLanes; i++) n += counts[i];
  return n;
}
PK_HD double counted(int32_t counts) { return counts; }
template <class V> struct CountOf {
  using Type = VecI;
};
template <> struct CountOf<double> {
  using Type = int32_t;
};

template <class V> struct TileSums {
  typename CountOf<V>::Type low = {}, high = {}, dual = {};
  V loss = {}, ratio = {}, approx_kl = {}, kl = {}, entropy = {};
  V min = splat<V>(__builtin_inff()), max = {};

  PK_HD void add(const PolicyTerm<V>& t, V ratio_if_kept, V ratio_or_inf) {
    count(low, t.low);
    count(high, t.high);
    count(dual, t.dual);
    loss += t.loss;
    ratio += ratio_if_kept;
    approx_kl += t.approx_kl;
    kl += t.kl;
    min = vmin(ratio_or_inf, min);
    max = vmax(ratio_if_kept, max);
  }
  PK_HD void flush(double* sums) {
    sums[kSumLoss] += lane_sum(loss);
    sums[kSumLow] += counted(low);
    sums[kSumHigh] += counted(high);
    sums[kSumDual] += counted(dual);
    sums[kSumRatio] += lane_sum(ratio);
    sums[kSumApproxKl] += lane_sum(approx_kl);
    sums[kSumKl] += lane_sum(kl);
    sums[kSumEntropy] += lane_sum(entropy);
    sums[kMinRatio] = vmin(lane_min(min), sums[kMinRatio]);
    sums[kMaxRatio] = vmax(double(reduce_max(max)), sums[kMaxRatio]);
    *this = TileSums();
  }
};

// The arrays that have one value per token, null where there is none.
enum TokenArray : int { kLogp, kOldLogp, kRefLogp, kAdvantage, kWeight, kEpsLow, kEpsHigh, kEntropyOf, kTokenArrays };
template <class S> struct Tokens {  // from some token on
  const S* of[kTokenArrays];
  const uint8_t* mask;
  S* grad;
};

// What all tokens of a sequence share.
template <class S> struct Shared {
  PolicyRule<S> rule;
  PolicyRow<S> row;
  S advantage, token_weight;  // where they have none of their own
  S weight;                   // of the sequence
};

template <PolicyKind KIND, Penalty PENALTY, bool GENERAL, class V> struct Walk {
  using S = typename Lanes<V>::Scalar;
  static constexpr int64_t L = Lanes<V>::count;
  Shared<S> shared;
  TileSums<V> sums;

  PK_HD V value(const Tokens<S>& at, TokenArray which, int64_t i, S otherwise) const {
    return GENERAL && at.of[which] ? Mem<V>::load(at.of[which] + i) : splat<V>(otherwise);
  }
  PK_HD bool with_ref() const { return PENALTY == Penalty::any ? shared.rule.kl != KlKind::none : PENALTY == Penalty::k3; }

  using Mask = typename Keep<V>::Type;
  template <bool MASKED> PK_HD Mask keep(const Tokens<S>& at, int64_t i) const {
    return MASKED ? Keep<V>::load(at.mask + i) : Mask{};
  }

  template <bool MASKED> PK_HD PolicyToken<V> load(const Tokens<S>& at, int64_t i, Mask keep) const {
    PolicyToken<V> t;
    t.logp = Mem<V>::load(at.of[kLogp] + i);
    t.d = is_anchor(KIND) ? V{} : t.logp - Mem<V>::load(at.of[kOldLogp] + i);
    t.to_ref = with_ref() ? Mem<V>::load(at.of[kRefLogp] + i) - t.logp : V{};
    t.advantage = value(at, kAdvantage, i, shared.advantage);
    t.own_bounds = GENERAL && (at.of[kEpsLow] || at.of[kEpsHigh]);
    t.eps_low = value(at, kEpsLow, i, shared.rule.eps_low);
    t.eps_high = value(at, kEpsHigh, i, shared.rule.eps_high);
    t.weight = value(at, kWeight, i, shared.token_weight);
    if (MASKED) {  // lanes that do not count get d = A = x = 0, which adds nothing but a ratio of 1
      const V zero = {};
      t.d = keep ? t.d : zero;
      t.to_ref = keep ? t.to_ref : zero;
      t.advantage = keep ? t.advantage : zero;
      if (GENERAL) {
        t.logp = keep ? t.logp : zero;
        t.weight = keep ? t.weight : zero;
        t.eps_low = keep ? t.eps_low : zero;
        t.eps_high = keep ? t.eps_high : zero;
      }
    }
    return t;
  }

  template <bool MASKED> PK_HD void step(const Tokens<S>& at, int64_t i) {
    const Mask keeps = keep<MASKED>(at, i);
    const PolicyTerm<V> t = policy_term<KIND, PENALTY, GENERAL>(shared.rule, shared.row, load<MASKED>(at, i, keeps));
    const V infinity = splat<V>(__builtin_inff()), zero = {};
    if (!MASKED) {
      sums.add(t, t.ratio, is_anchor(KIND) ? infinity : t.ratio);
      if (GENERAL && at.of[kEntropyOf]) sums.entropy += Mem<V>::load(at.of[kEntropyOf] + i);
      if (at.grad) Mem<V>::store(at.grad + i, t.grad * shared.weight);
      return;
    }
    sums.add(t, keeps ? t.ratio : zero, is_anchor(KIND) ? infinity : (keeps ? t.ratio : infinity));
    if (GENERAL && at.of[kEntropyOf]) sums.entropy += keeps ? Mem<V>::load(at.of[kEntropyOf] + i) : zero;
    if (at.grad) Mem<V>::store(at.grad + i, keeps ? t.grad * shared.weight : zero);
  }

  // Sums of the sequence's ratio: [kRowLogRatio, kRowWeight, kRowKl].
  template <bool MASKED> PK_HD void row_step(const Tokens<S>& at, int64_t i, V* row) const {
    const PolicyToken<V> t = load<MASKED>(at, i, keep<MASKED>(at, i));
    row[kRowLogRatio] += sequence_log_ratio<KIND>(t.d, t.advantage, t.eps_low, t.eps_high);
    row[kRowWeight] += t.weight;
    if (!shared.rule.kl_ratio) return;
    V kl, grad;
    kl_term<PENALTY>(shared.rule, t.to_ref, kl, grad);
    row[kRowKl] += kl;
  }

  // Tokens [i, i + count), count < L, by way of a vector that is filled up with tokens that do not count.
  template <class F> PK_HD void rest(const Tokens<S>& at, int64_t i, int64_t count, const F& f) {
    S copies[kTokenArrays][L] = {}, grad[L];
    uint8_t mask[L] = {};
    Tokens<S> padded;
    for (int k = 0; k < kTokenArrays; k++) {
      padded.of[k] = at.of[k] ? copies[k] : nullptr;
      for (int64_t j = 0; at.of[k] && j < count && j < L; j++) copies[k][j] = at.of[k][i + j];
    }
    for (int64_t j = 0; j < count && j < L; j++) mask[j] = at.mask ? at.mask[i + j] : 1;
    padded.mask = mask;
    padded.grad = at.grad ? grad : nullptr;
    f(padded);
    for (int64_t j = 0; at.grad && j < count; j++) at.grad[i + j] = grad[j];
  }

  PK_HD void run(const Tokens<S>& at, int64_t n, double* out) {
    static_assert(kTile % L == 0, "only the last tile may have a rest");
    for (int64_t i = 0; i < n;) {
      const int64_t stop = i + kTile < n ? i + kTile : n;
      if (at.mask) {
        for (; i + L <= stop; i += L) {
          const Cover c = cover<int(L)>(at.mask + i);
          if (c == Cover::all) step<false>(at, i);
          else if (c == Cover::some) step<true>(at, i);
          else if (at.grad) Mem<V>::store(at.grad + i, V{});
        }
      } else {
        for (; i + L <= stop; i += L) step<false>(at, i);
      }
      if (i < stop) rest(at, i, stop - i, [&](const Tokens<S>& padded) { step<true>(padded, 0); });
      i = stop;
      sums.flush(out);
    }
  }

  PK_HD void run_row(Tokens<S> at, int64_t n, double* out) {
    at.grad = nullptr;
    for (int64_t i = 0; i < n;) {
      const int64_t stop = i + kTile < n ? i + kTile : n;
      V row[kPolicyRowSums] = {};
      if (at.mask) {
        for (; i + L <= stop; i += L) row_step<true>(at, i, row);
      } else {
        for (; i + L <= stop; i += L) row_step<false>(at, i, row);
      }
      if (i < stop) rest(at, i, stop - i, [&](const Tokens<S>& padded) { row_step<true>(padded, 0, row); });
      i = stop;
      for (int k = 0; k < kRowTokens; k++) out[k] += lane_sum(row[k]);
    }
  }
};

template <PolicyKind KIND, Penalty PENALTY, bool GENERAL, class V>
void walk(const Shared<typename Lanes<V>::Scalar>& shared, const Tokens<typename Lanes<V>::Scalar>& tokens, int64_t n,
          double* sums) {
  const auto at = tokens;  // a copy: what is stored could otherwise change the pointers
  Walk<KIND, PENALTY, GENERAL, V> walk{shared, {}};
  if constexpr (ratio_of_sequence(KIND)) {
    double row[kPolicyRowSums] = {};
    row[kRowTokens] = sums[kSumTokens];
    walk.run_row(at, n, row);
    walk.shared.row = policy_row<typename Lanes<V>::Scalar>(KIND, row);
  }
  walk.run(at, n, sums);
}

template <class V> using Body = decltype(&walk<PolicyKind::clip, Penalty::none, false, V>);

template <class V> Body<V> body_of(PolicyKind kind, KlKind kl, bool plain) {
  constexpr PolicyKind clip = PolicyKind::clip;
  if (plain) return kl == KlKind::none ? &walk<clip, Penalty::none, false, V> : &walk<clip, Penalty::k3, false, V>;
  switch (kind) {
#define PK_BODY(KIND) \
  case PolicyKind::KIND: return &walk<PolicyKind::KIND, Penalty::any, true, V>;
    PK_BODY(clip)
    PK_BODY(cispo)
    PK_BODY(reinforce)
    PK_BODY(sapo)
    PK_BODY(gspo)
    PK_BODY(gspo_token)
    PK_BODY(gmpo)
    PK_BODY(none)
    PK_BODY(anchor_shaped)
    PK_BODY(anchor_nll)
#undef PK_BODY
  }
  return nullptr;
}

template <class T> PK_HD T* from(T* p, int64_t i) { return p ? p + i : nullptr; }

template <class V> void sequences(const PolicyArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t first, int64_t last) {
  using S = typename Lanes<V>::Scalar;
  const bool plain = is_plain(a);
  for (int64_t b = first; b < last; b++) {
    double* mine = sums + b * kPolicySums;
    for (int k = 0; k < kPolicySums; k++) mine[k] = k == kMinRatio ? __builtin_inf() : 0;
    const int64_t begin = sequence_begin(a.layout, b), n = sequence_end(a.layout, b) - begin;
    const uint8_t* mask = from(a.mask, begin);
    const int64_t tokens = mask ? count_tokens(mask, n) : n;
    S* grad = from(a.grad, begin);
    if (tokens == 0) {
      if (grad) __builtin_memset(grad, 0, n * sizeof(S));
      continue;
    }
    const PolicyOptions options = sequence_options(a, b);
    mine[kSumTokens] = double(tokens);
    mine[kSumRatioTokens] = is_anchor(options.kind) ? 0 : double(tokens);
    mine[kSumSequences] = 1;
    const auto own = [&](const S* p, bool per_token) { return per_token ? p + begin : nullptr; };
    const Tokens<S> at{{a.logp + begin, a.old_logp + begin, from(a.ref_logp, begin), own(a.advantages, a.token_advantages),
                        own(a.weights, a.token_weights), own(a.eps_low, a.token_eps_low), own(a.eps_high, a.token_eps_high),
                        from(a.entropy, begin)},
                       tokens == n ? nullptr : mask,
                       grad};
    const Shared<S> shared{
        policy_rule<S>(options), PolicyRow<S>(), a.advantages && !a.token_advantages ? a.advantages[b] : S(-1),
        a.weights && !a.token_weights ? a.weights[b] : S(1), sequence_weight<S>(options.agg, double(tokens))};
    body_of<V>(options.kind, options.kl, plain)(shared, at, n, mine);
    mine[kSumLoss] *= double(shared.weight);
  }
}

template <class V> void backward(const PolicyGradArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const S upstream = *a.upstream, inverse_norm = *a.inverse_norm;
  int64_t i = begin;
  for (; i + L <= end; i += L) Mem<V>::store(a.grad + i, policy_grad(Mem<V>::load(a.unnormalised + i), upstream, inverse_norm));
  for (; i < end; i++) a.grad[i] = policy_grad(a.unnormalised[i], upstream, inverse_norm);
}

}  // namespace

extern const TokenLossCpu token_loss_cpu;
const TokenLossCpu token_loss_cpu = {&sequences<VecF>, &sequences<double>, &backward<VecF>, &backward<double>};

}  // namespace PK_ISA
}  // namespace prefkern
