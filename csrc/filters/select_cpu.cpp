// The CPU walk of select.h. Values are turned into keys a block at a time, in vectors; those that take part in a pass are
// moved together without a branch, and only they are counted, in two histograms in turn, so that equal digits in a row do
// not wait for one another.
#include "filters/select_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kBlock = 256;

PK_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// f(first, n, mask or null) for whole blocks, with a constant n, and for the rest.
template <class F> PK_HD void for_blocks(const uint8_t* mask, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) f(i, kBlock, mask ? mask + i : nullptr);
  if (i < end) f(i, end - i, mask ? mask + i : nullptr);
}

template <class S>
int64_t count_digits(const SelectArgs<S>& a, typename OrderKey<S>::Type chosen, int pass, int64_t* histogram, int64_t begin,
                     int64_t end) {
  using Key = typename OrderKey<S>::Type;
  constexpr int64_t most = int64_t(1) << 30;  // what the narrow counts hold
  int64_t nans = 0;
  for (int64_t from = begin; from < end; from += most) {
    uint32_t counts[2][kDigits] = {};
    for_blocks(a.mask, from, smaller(end, from + most), [&](int64_t first, int64_t n, const uint8_t* mask) {
      uint32_t digits[kBlock + 1];
      uint8_t takes_part[kBlock];
      const S* x = a.values + first;
      uint32_t nans_here = 0;
      for (int64_t k = 0; k < n; k++) {
        const bool counts_at_all = !mask || mask[k] != 0, is_nan = x[k] != x[k];
        const Key key = order_key(x[k]);
        digits[k] = digit<S>(key, pass);
        takes_part[k] = counts_at_all & !is_nan & digits_match<S>(key, chosen, pass);
        nans_here += counts_at_all & is_nan;
      }
      nans += nans_here;
      int64_t m = 0;
      for (int64_t k = 0; k < n; k++) {
        digits[m] = digits[k];
        m += takes_part[k];
      }
      int64_t k = 0;
      for (; k + 2 <= m; k += 2) {
        counts[0][digits[k]]++;
        counts[1][digits[k + 1]]++;
      }
      if (k < m) counts[0][digits[k]]++;
    });
    for (int d = 0; d < kDigits; d++) histogram[d] += int64_t(counts[0][d]) + int64_t(counts[1][d]);
  }
  return nans;
}

template <class S> struct VectorOf {
  using Type = VecF;
};
template <> struct VectorOf<double> {
  using Type = double;
};

template <class S> S next_above(const SelectArgs<S>& a, S low, int64_t begin, int64_t end) {
  using V = typename VectorOf<S>::Type;
  const V bound = splat<V>(low), infinity = splat<V>(S(__builtin_inf()));
  V next = infinity;
  int64_t i = begin;
  for (; i + Lanes<V>::count <= end; i += Lanes<V>::count) {
    const V x = Mem<V>::load(a.values + i), above = x > bound ? x : infinity;  // NaN is not
    next = vmin(a.mask ? (Keep<V>::load(a.mask + i) ? above : infinity) : above, next);
  }
  S least = -reduce_max(-next);
  for (; i < end; i++) {
    const bool wanted = (!a.mask || a.mask[i] != 0) && a.values[i] > low && a.values[i] < least;
    least = wanted ? a.values[i] : least;
  }
  return least;
}

template <class S> PK_HD int64_t count_equal_here(const S* x, const uint8_t* mask, S value, int64_t n) {
  uint32_t equal = 0;
  for (int64_t k = 0; k < n; k++) equal += (!mask || mask[k] != 0) & (x[k] == value);
  return equal;
}
template <class S> int64_t count_equal(const SelectArgs<S>& a, S value, int64_t begin, int64_t end) {
  int64_t equal = 0;
  for_blocks(a.mask, begin, end, [&](int64_t first, int64_t n, const uint8_t* mask) {
    equal += count_equal_here(a.values + first, mask, value, n);
  });
  return equal;
}

template <bool OR_EQUAL, class S> PK_HD void write_keep(uint8_t* keep, const S* x, const uint8_t* mask, S value, int64_t n) {
  for (int64_t k = 0; k < n; k++) keep[k] = (!mask || mask[k] != 0) & (OR_EQUAL ? x[k] >= value : x[k] > value);
}
template <class S> void keep_from(const SelectArgs<S>& a, S value, int64_t begin, int64_t end) {
  for_blocks(a.mask, begin, end, [&](int64_t first, int64_t n, const uint8_t* mask) {
    write_keep<true>(a.keep + first, a.values + first, mask, value, n);
  });
}
template <class S> void keep_above(const SelectArgs<S>& a, S value, int64_t ties, int64_t begin, int64_t end) {
  for_blocks(a.mask, begin, end, [&](int64_t first, int64_t n, const uint8_t* mask) {
    const S* x = a.values + first;
    uint8_t* keep = a.keep + first;
    if (ties == 0) return write_keep<false>(keep, x, mask, value, n);
    const int64_t equal = count_equal_here(x, mask, value, n);
    write_keep<true>(keep, x, mask, value, n);
    for (int64_t k = n, over = equal - ties; over > 0;) {  // the last ones are too many
      const bool tie = keep[--k] && x[k] == value;
      keep[k] ^= tie;
      over -= tie;
    }
    ties -= smaller(ties, equal);
  });
}

}  // namespace

extern const SelectCpu select_cpu;
const SelectCpu select_cpu = {
    {&count_digits<float>, &next_above<float>, &count_equal<float>, &keep_above<float>, &keep_from<float>},
    {&count_digits<double>, &next_above<double>, &count_equal<double>, &keep_above<double>, &keep_from<double>}};

}  // namespace PK_ISA
}  // namespace prefkern
