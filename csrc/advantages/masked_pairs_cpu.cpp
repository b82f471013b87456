// The CPU walk of masked_pairs.h: a group's rewards and scores side by side, then every pair.
#include "advantages/masked_pairs_cpu.h"

#include <cstdlib>
#include <new>

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class S> void group_pairs(const MaskedPairArgs<S>& a, const int64_t* rows, int64_t n, double* r, double* q) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) {
    r[i] = double(a.rewards[rows[i]]);
    q[i] = double(a.scores[rows[i]]);
    mean += r[i] / double(n);
  }
  for (int64_t i = 0; i < n; i++) squares += (r[i] - mean) * (r[i] - mean);
  double kept_n = 0, kept_mean = 0;
  for (int64_t i = 0; i < n; i++) {
    double all = 0, sum = 0;
    int64_t differ = 0, left = 0;
    for (int64_t j = 0; j < n; j++) {
      const double d = r[i] - r[j];
      const bool differs = d != 0, counts = differs & pair_counts(a.mode, d, q[i] - q[j], a.tau);
      differ += differs;
      left += counts;
      all += d;
      sum += counts ? d : 0.0;
    }
    a.kept[rows[i]] = left > 0;
    a.masked[rows[i]] = differ - left;
    a.values[rows[i]] = !a.whole_samples ? sum : left > 0 ? all : 0.0;
    if (left == 0) continue;
    kept_n += 1;
    kept_mean += (r[i] - kept_mean) / kept_n;
  }
  double sigma = vsqrt(squares / freedom(double(n), a.ddof));
  if (a.sigma_of_kept) {
    double kept_squares = 0;
    for (int64_t i = 0; i < n; i++)
      if (a.kept[rows[i]]) kept_squares += (r[i] - kept_mean) * (r[i] - kept_mean);
    sigma = kept_sigma(kept_n, kept_squares, a.ddof);
  }
  for (int64_t i = 0; i < n; i++) a.values[rows[i]] = pair_advantage(a.values[rows[i]], double(n), sigma, a.eps);
}

template <class S>
void groups(const MaskedPairArgs<S>& a, const int64_t* order, const int64_t* offsets, int64_t begin, int64_t end) {
  int64_t largest = 1;
  for (int64_t g = begin; g < end; g++) largest = offsets[g + 1] - offsets[g] > largest ? offsets[g + 1] - offsets[g] : largest;
  double* memory = static_cast<double*>(std::malloc(2 * largest * sizeof(double)));
  if (!memory) throw std::bad_alloc();
  for (int64_t g = begin; g < end; g++)
    group_pairs(a, order + offsets[g], offsets[g + 1] - offsets[g], memory, memory + largest);
  std::free(memory);
}

}  // namespace

extern const MaskedPairsCpu masked_pairs_cpu;
const MaskedPairsCpu masked_pairs_cpu = {&groups<float>, &groups<double>};

}  // namespace PK_ISA
}  // namespace prefkern
