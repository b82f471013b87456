// The CPU walk of divergence.h: 64 tokens at once are compared by memcmp, which is vectorised, so that this file needs no
// instruction set of its own. Pairs are shared out over torch's threads.
#include "conflicts/divergence.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kTokensPerTask = 1 << 16, kStep = 64;

// How many tokens of a sequence count, or -1.
int64_t kept_length(const SequenceLayout& layout, const uint8_t* mask, int64_t b) {
  const int64_t begin = sequence_begin(layout, b), end = sequence_end(layout, b);
  if (!mask || begin == end) return end - begin;
  const uint8_t* kept = std::find(mask + begin, mask + end, uint8_t(0));
  const bool hole = std::any_of(kept, mask + end, [](uint8_t m) { return m != 0; });
  return hole ? -1 : kept - (mask + begin);
}

template <class T> int64_t common_prefix(const T* a, const T* b, int64_t n) {
  int64_t at = 0;
  while (at + kStep <= n && std::memcmp(a + at, b + at, kStep * sizeof(T)) == 0) at += kStep;
  while (at < n && a[at] == b[at]) at++;
  return at;
}

template <class T> int64_t run(const DivergenceArgs<T>& args) {
  const int64_t rows = args.layout_a.sequences;
  std::atomic<int64_t> bad{-1};
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * rows / std::max<int64_t>(1, args.layout_a.tokens));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t n_a = kept_length(args.layout_a, args.mask_a, b), n_b = kept_length(args.layout_b, args.mask_b, b);
      if (n_a < 0 || n_b < 0) {
        bad = 2 * b + (n_a >= 0);
        continue;
      }
      args.position[b] = common_prefix(args.ids_a + sequence_begin(args.layout_a, b),
                                       args.ids_b + sequence_begin(args.layout_b, b), std::min(n_a, n_b));
    }
  });
  return bad;
}

}  // namespace

int64_t cpu_first_divergence(const DivergenceArgs<int32_t>& args) { return run(args); }
int64_t cpu_first_divergence(const DivergenceArgs<int64_t>& args) { return run(args); }

}  // namespace prefkern
