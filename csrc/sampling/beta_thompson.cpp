// CPU entry points of beta_thompson.h: pick the instruction set, cut the prompts into a slice per thread, keep the best of each,
// and join them. What is kept is exact, so the cut does not matter.
#include "sampling/beta_thompson.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "sampling/beta_thompson_cpu.h"

namespace prefkern {

PK_ISA_TABLE(BetaThompsonCpu, beta_thompson_cpu)

namespace {

constexpr int64_t kBlock = 1024, kPromptsPerSlice = 1 << 13;

ThompsonWalk<float> walk(float) { return beta_thompson_cpu().f32; }
ThompsonWalk<double> walk(double) { return beta_thompson_cpu().f64; }

template <class S> struct Candidate {
  S utility;
  int64_t id;
  bool operator<(const Candidate& other) const {  // better ones first
    return utility > other.utility || (utility == other.utility && id < other.id);
  }
};

// The k best of what is added, id by id ascending: up to 2 k are held, then the worse half goes.
template <class S> class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)) {}
  void add(const S* utilities, int64_t n, int64_t first) {
    for (int64_t i = 0; i < n; i++) {
      if (!(utilities[i] > least_)) continue;  // equal to the least of k that came before: it loses the tie
      held_.push_back({utilities[i], first + i});
      if (held_.size() >= 2 * k_ + kBlock) cut();
    }
  }
  std::vector<Candidate<S>>& cut() {
    if (held_.size() > k_) {
      std::nth_element(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(k_), held_.end());
      held_.resize(k_);
      if (k_ > 0) least_ = std::max_element(held_.begin(), held_.end())->utility;
    }
    return held_;
  }

 private:
  size_t k_;
  S least_ = -std::numeric_limits<S>::infinity();  // of k that are held, once so many have been
  std::vector<Candidate<S>> held_;
};

struct Found {
  int64_t eligible = 0, wrong = -1;
};

template <class S> void thompson(const ThompsonArgs<S>& a) {
  const int64_t slices = std::clamp<int64_t>(a.count / kPromptsPerSlice, 1, num_threads());
  std::vector<Best<S>> best(static_cast<size_t>(slices), Best<S>(a.k));
  std::vector<Found> of_slice(static_cast<size_t>(slices));
  parallel_for(0, slices, 1, [&](int64_t first_slice, int64_t last_slice) {
    std::vector<S> utilities(kBlock);
    for (int64_t s = first_slice; s < last_slice; s++) {
      const int64_t begin = a.count / slices * s, end = s + 1 == slices ? a.count : a.count / slices * (s + 1);
      Found& mine = of_slice[static_cast<size_t>(s)];
      for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t last = std::min(end, first + kBlock);
        const int64_t wrong = walk(S())(a, utilities.data(), first, last);
        if (mine.wrong < 0) mine.wrong = wrong;
        for (int64_t i = 0; i < last - first; i++) mine.eligible += utilities[static_cast<size_t>(i)] >= 0;
        best[static_cast<size_t>(s)].add(utilities.data(), last - first, first);
      }
      best[static_cast<size_t>(s)].cut();
    }
  });
  Found found;
  for (const Found& one : of_slice) {
    found.eligible += one.eligible;
    if (found.wrong < 0) found.wrong = one.wrong;
  }
  a.found[0] = found.eligible;
  a.found[1] = found.wrong;
  if (found.wrong >= 0 || found.eligible < a.k) return;
  std::vector<Candidate<S>> all;
  for (Best<S>& one : best) all.insert(all.end(), one.cut().begin(), one.cut().end());
  std::partial_sort(all.begin(), all.begin() + a.k, all.end());
  for (int64_t i = 0; i < a.k; i++) {
    a.ids[i] = all[static_cast<size_t>(i)].id;
    a.top[i] = all[static_cast<size_t>(i)].utility;
  }
}

template <class S> void update(const BetaUpdateArgs<S>& a) {
  const S lam1 = S(a.lam1), lam2 = S(a.lam2);
  for (int64_t i = 0; i < a.selected; i++) {
    a.scratch[2 * i] = lam1 * a.alpha[a.ids[i]] + a.successes[i];
    a.scratch[2 * i + 1] = lam1 * a.beta[a.ids[i]] + (a.rollouts[i] - a.successes[i]);
  }
  if (lam2 != 1)
    parallel_for(0, a.count, 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) a.alpha[i] *= lam2;
      for (int64_t i = begin; i < end; i++) a.beta[i] *= lam2;
    });
  for (int64_t i = 0; i < a.selected; i++) {
    a.alpha[a.ids[i]] = a.scratch[2 * i];
    a.beta[a.ids[i]] = a.scratch[2 * i + 1];
  }
}

}  // namespace

void cpu_beta_thompson(const ThompsonArgs<float>& args) { thompson(args); }
void cpu_beta_thompson(const ThompsonArgs<double>& args) { thompson(args); }
void cpu_beta_update(const BetaUpdateArgs<float>& args) { update(args); }
void cpu_beta_update(const BetaUpdateArgs<double>& args) { update(args); }

}  // namespace prefkern
