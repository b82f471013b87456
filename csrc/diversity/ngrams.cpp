// The CPU walk of ngrams.h. An n-gram is numbered by the number of its first n - 1 tokens and its last one, so that a key of
// 64 bits is the whole n-gram. How often it comes most in a response other than k is its largest count, or where that is k's
// own the second largest: every response is counted once.
#include "diversity/ngrams.h"

#include <cmath>
#include <limits>

#include "diversity/prompt_tokens.h"

namespace prefkern {
namespace {

constexpr int64_t kTokensPerTask = 1 << 13;

struct Counts {
  uint32_t here, most, second, owner;  // in the response at hand; the largest two of all; whose the largest is
};
struct Counted {
  uint32_t gram, count;
};

struct Walk {
  PromptTokens prompt;
  std::vector<uint32_t> grams;  // the number of the n-gram that begins at each token
  Interner numbers;
  std::vector<Counts> counts;
  std::vector<Counted> distinct;
  std::vector<int64_t> distinct_begins;
  std::vector<double> log_sums;
  std::vector<bool> no_match;

  int64_t grams_of(int64_t k, int64_t n) const { return std::max<int64_t>(0, prompt.length(k) - n + 1); }

  // From those of n - 1 to those of n; how many different ones there are.
  int64_t lengthen(int64_t n) {
    if (n == 1) {
      grams = prompt.tokens;
      return prompt.interner.size();
    }
    numbers.reset(static_cast<int64_t>(grams.size()));
    for (int64_t k = 0; k < prompt.responses(); k++)
      for (int64_t i = prompt.begins[k], end = i + grams_of(k, n); i < end; i++)
        grams[i] = numbers(uint64_t(grams[i]) << 32 | prompt.tokens[i + n - 1]);
    return numbers.size();
  }

  void count(int64_t n) {
    counts.assign(lengthen(n), Counts{});
    distinct.clear();
    distinct_begins.assign(1, 0);
    for (int64_t k = 0; k < prompt.responses(); k++) {
      const auto first = distinct.size();
      for (int64_t i = prompt.begins[k], end = i + grams_of(k, n); i < end; i++)
        if (counts[grams[i]].here++ == 0) distinct.push_back({grams[i], 0});
      for (auto at = first; at < distinct.size(); at++) {
        Counts& c = counts[distinct[at].gram];
        distinct[at].count = c.here;
        if (c.here > c.most) {
          c.second = c.most;
          c.most = c.here;
          c.owner = static_cast<uint32_t>(k);
        } else if (c.here > c.second) {
          c.second = c.here;
        }
        c.here = 0;
      }
      distinct_begins.push_back(static_cast<int64_t>(distinct.size()));
    }
  }

  int64_t matched(int64_t k) const {
    int64_t sum = 0;
    for (int64_t at = distinct_begins[k]; at < distinct_begins[k + 1]; at++) {
      const Counts& c = counts[distinct[at].gram];
      sum += std::min(distinct[at].count, c.owner == k ? c.second : c.most);
    }
    return sum;
  }

  double brevity(int64_t k) const {
    const int64_t length = prompt.length(k);
    int64_t nearest = -1;
    for (int64_t j = 0; j < prompt.responses(); j++) {
      if (j == k) continue;
      const int64_t other = prompt.length(j), apart = std::abs(other - length), so_far = std::abs(nearest - length);
      if (nearest < 0 || apart < so_far || (apart == so_far && other < nearest)) nearest = other;
    }
    return length > nearest ? 1.0 : std::exp(1.0 - double(nearest) / double(length));
  }

  template <class T> double self_bleu(const SelfBleuArgs<T>& a, int64_t p) {
    prompt.read(a.of, p);
    const int64_t responses = prompt.responses();
    if (responses < 2) return std::numeric_limits<double>::quiet_NaN();
    log_sums.assign(responses, 0.0);
    no_match.assign(responses, false);
    for (int64_t n = 1; n <= a.orders; n++) {
      count(n);
      for (int64_t k = 0; k < responses; k++) {
        const int64_t m = matched(k);
        if (n == 1) no_match[k] = m == 0;
        const double precision = (m == 0 ? a.smoothing : double(m)) / double(std::max<int64_t>(1, grams_of(k, n)));
        if (a.weights[n - 1] != 0) log_sums[k] += a.weights[n - 1] * std::log(precision);
      }
    }
    double sum = 0;
    for (int64_t k = 0; k < responses; k++) sum += no_match[k] ? 0.0 : brevity(k) * std::exp(log_sums[k]);
    return sum / double(responses);
  }

  template <class T> double distinct_n(const DistinctArgs<T>& a, int64_t p) {
    prompt.read(a.of, p);
    int64_t all = 0, different = 0;
    for (int64_t k = 0; k < prompt.responses(); k++) all += grams_of(k, a.n);
    if (all == 0) return 0;
    for (int64_t n = 1; n <= a.n; n++) different = lengthen(n);
    return double(different) / double(all);
  }
};

template <class T> void run_self_bleu(const SelfBleuArgs<T>& a) {
  for_prompts(a.of, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Walk walk;
    for (int64_t p = begin; p < end; p++) a.of.result[p] = walk.self_bleu(a, p);
  });
}
template <class T> void run_distinct_n(const DistinctArgs<T>& a) {
  for_prompts(a.of, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Walk walk;
    for (int64_t p = begin; p < end; p++) a.of.result[p] = walk.distinct_n(a, p);
  });
}

}  // namespace

void cpu_self_bleu(const SelfBleuArgs<int32_t>& args) { run_self_bleu(args); }
void cpu_self_bleu(const SelfBleuArgs<int64_t>& args) { run_self_bleu(args); }
void cpu_distinct_n(const DistinctArgs<int32_t>& args) { run_distinct_n(args); }
void cpu_distinct_n(const DistinctArgs<int64_t>& args) { run_distinct_n(args); }

}  // namespace prefkern
