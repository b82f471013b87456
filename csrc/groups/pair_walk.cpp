// The CPU walk of pair_walk.h: a pair is looked at once, from its winner. Groups are shared out over torch's threads.
#include "groups/pair_walk.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kPairsPerTask = 1 << 12, kRowsPerTask = 1 << 16;

template <class S> void run(const PairArgs<S>& a) {
  const GroupIndex index = group_index(a.rows.ids, a.rows.count);
  const int64_t groups = index.groups(), size = a.rows.count / std::max<int64_t>(1, groups);
  std::vector<double> losses(groups), pairs(groups);
  const int64_t grain = std::max<int64_t>(1, kPairsPerTask / std::max<int64_t>(1, size * size));
  parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> grads;
    for (int64_t k = begin; k < end; k++) {
      const int64_t* rows = index.order.data() + index.offsets[k];
      const int64_t n = index.offsets[k + 1] - index.offsets[k];
      grads.assign(n, 0.0);
      double loss = 0, count = 0;
      for (int64_t i = 0; i < n; i++) {
        const int64_t winner = a.levels[rows[i]];
        const double score = pair_score(double(a.scores[rows[i]]), winner);
        double grad = 0;
        for (int64_t j = 0; j < n; j++) {
          const int64_t loser = a.levels[rows[j]];
          if (winner >= loser) continue;
          const PairTerm t = pair_term(a.rule, score, winner, pair_score(double(a.scores[rows[j]]), loser), loser);
          loss += t.loss;
          count += 1;
          grad += t.winner_grad;
          grads[j] += t.loser_grad;
        }
        grads[i] += grad;
      }
      losses[k] = loss;
      pairs[k] = count;
      if (a.unnormalised)
        for (int64_t i = 0; i < n; i++) a.unnormalised[rows[i]] = S(grads[i]);
    }
  });
  double loss = 0, count = 0;
  for (int64_t k = 0; k < groups; k++) {
    loss += losses[k];
    count += pairs[k];
  }
  *a.loss = S(pair_mean(loss, count));
  *a.pairs = static_cast<int64_t>(count);
}

template <class S> void run_backward(const PairGradArgs<S>& a) {
  const double upstream = double(*a.upstream), pairs = double(*a.pairs);
  parallel_for(0, a.count, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) a.grad[i] = S(pair_grad(double(a.unnormalised[i]), upstream, pairs));
  });
}

}  // namespace

void cpu_level_pairs(const PairArgs<float>& args) { run(args); }
void cpu_level_pairs(const PairArgs<double>& args) { run(args); }
void cpu_level_pairs_backward(const PairGradArgs<float>& args) { run_backward(args); }
void cpu_level_pairs_backward(const PairGradArgs<double>& args) { run_backward(args); }

}  // namespace prefkern
