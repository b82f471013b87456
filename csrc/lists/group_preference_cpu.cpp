// The CPU walk of group_preference.h, a row per lane (row_tile.h).
#include "lists/group_preference_cpu.h"

#include "lists/row_tile.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

enum Array : int { kScore, kWinner, kGrad };

// Scores, and 1 for a winner, 0 for a loser, NaN for what does not count.
template <class V>
void load(const Tile<V>& t, const GroupPreferenceArgs<typename Lanes<V>::Scalar>& a, int64_t first, int64_t last) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const int64_t row = first * t.items, rows = last - first;
  t.load(kScore, a.scores + row, rows, t.items, t.items);
  S *score = t.array(kScore), *winner = t.array(kWinner);
  for (int64_t lane = 0; lane < L; lane++)
    for (int64_t i = 0; i < t.items; i++) {
      const int64_t at = row + (lane < rows ? lane : 0) * t.items + i, to = i * L + lane;
      const bool keep = !a.mask || a.mask[at];
      winner[to] = keep ? S(a.winner[at] != 0) : S(no_label());
      if (!keep) score[to] = 0;
    }
}

template <class V>
void rows(const GroupPreferenceArgs<typename Lanes<V>::Scalar>& a, typename Lanes<V>::Scalar* scratch, int64_t begin,
          int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {}, one = splat<V>(1);
  const Tile<V> t{a.items, a.items * L, scratch};
  for (int64_t first = begin; first < end; first += L) {
    const int64_t last = first + L < end ? first + L : end, count = last - first;
    load(t, a, first, last);
    V winners = zero, losers = zero, winner_sum = zero, loser_sum = zero;
    for (int64_t i = 0; i < t.items; i++) {
      const V score = t.get(kScore, i), flag = t.get(kWinner, i);
      const Mask<V> wins = flag > 0, loses = flag == 0;
      winners += wins ? one : zero;
      losers += loses ? one : zero;
      winner_sum += wins ? score : zero;
      loser_sum += loses ? score : zero;
    }
    const Mask<V> both = (winners > 0) & (losers > 0);
    winners = both ? winners : one;
    losers = both ? losers : one;
    const V winner_mean = winner_sum / winners, loser_mean = loser_sum / losers;
    V squares = zero;
    for (int64_t i = 0; i < t.items; i++) {
      const V d = t.get(kScore, i) - winner_mean;
      squares += t.get(kWinner, i) > 0 ? d * d : zero;
    }
    const GroupPreference<V> g = group_preference<V, S>(a.rule, winners, losers, winner_mean, loser_mean, squares);
    double* to = a.out.sums + first * kRowSums;
    each_lane(both ? g.loss : zero, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowLoss] = double(x); });
    each_lane(both ? one : zero, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowCounts] = double(x); });
    each_lane(both ? g.preference : zero, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowFirst] = double(x); });
    each_lane(both ? g.variance : zero, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowSecond] = double(x); });
    if (!a.unnormalised) continue;
    for (int64_t i = 0; i < t.items; i++) {
      const V score = t.get(kScore, i), flag = t.get(kWinner, i);
      const V grad = flag > 0 ? g.winner + g.winner_slope * (score - winner_mean) : (flag == 0 ? g.loser : zero);
      t.set(kGrad, i, both ? grad : zero);
    }
    t.store(kGrad, a.unnormalised + first * t.items, count, t.items);
  }
}

}  // namespace

extern const GroupPreferenceCpu group_preference_cpu;
const GroupPreferenceCpu group_preference_cpu = {&rows<VecF>, &rows<double>};

}  // namespace PK_ISA
}  // namespace prefkern
