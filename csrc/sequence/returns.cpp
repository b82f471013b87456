// The CPU walk of returns.h: token by token, sequences shared out over torch's threads. Each step needs the one before, so
// there is nothing for vector instructions, and this file is compiled once.
#include "sequence/returns.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/groups.h"
#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kTokensPerTask = 1 << 14;

template <bool VALUES, class S> void scan_sequence(const ReturnsArgs<S>& a, int64_t b) {
  const int64_t begin = sequence_begin(a.layout, b), limit = sequence_end(a.layout, b);
  const int64_t end = a.lengths ? begin + a.lengths[b] : limit;
  std::fill(a.advantages + end, a.advantages + limit, S(0));
  if (VALUES) std::fill(a.returns + end, a.returns + limit, S(0));
  const bool cut = VALUES && a.finished && !a.finished[b];
  bool repeat = cut && a.rule.bootstrap == Bootstrap::repeat;  // until a value has been met
  double next_value = cut && a.rule.bootstrap == Bootstrap::critic ? double(a.last_values[b]) : 0.0, carry = 0;
  for (int64_t i = end; i-- > begin;) {
    if (a.mask && !a.mask[i]) {
      a.advantages[i] = 0;
      if (VALUES) a.returns[i] = 0;
      continue;
    }
    double x = double(a.rewards[i]);
    if (VALUES) {
      const double value = double(a.values[i]);
      x = td_error(a.rule.gamma, x, value, repeat ? value : next_value);
      repeat = false;
      next_value = value;
    }
    carry = apply({x, a.rule.decay}, carry);
    a.advantages[i] = S(carry);
    if (VALUES) a.returns[i] = S(carry + next_value);
  }
}

template <class S> void run(const ReturnsArgs<S>& args) {
  const int64_t count = args.layout.sequences;
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * count / std::max<int64_t>(1, args.layout.tokens));
  const auto body = args.values ? &scan_sequence<true, S> : &scan_sequence<false, S>;
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) body(args, b);
  });
}

template <class S> int64_t run_segmented(const SegmentedArgs<S>& a) {
  GroupIndex index = group_index(a.segment, a.count);
  std::atomic<int64_t> twice{-1};
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * index.groups() / std::max<int64_t>(1, a.count));
  parallel_for(0, index.groups(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const auto first = index.order.begin() + index.offsets[k], last = index.order.begin() + index.offsets[k + 1];
      const auto earlier = [&](int64_t i, int64_t j) { return a.place[i] < a.place[j]; };
      if (!std::is_sorted(first, last, earlier)) std::sort(first, last, earlier);
      double carry = 0;
      for (auto row = last; row-- != first;) {
        carry = apply({double(a.rewards[*row]), a.gamma}, carry);
        a.returns[*row] = S(carry);
        if (row != first && a.place[*(row - 1)] == a.place[*row]) twice = *row;
      }
    }
  });
  return twice;
}

}  // namespace

void cpu_returns(const ReturnsArgs<float>& args) { run(args); }
void cpu_returns(const ReturnsArgs<double>& args) { run(args); }
int64_t cpu_segmented_returns(const SegmentedArgs<float>& args) { return run_segmented(args); }
int64_t cpu_segmented_returns(const SegmentedArgs<double>& args) { return run_segmented(args); }

}  // namespace prefkern
