// CPU entry points: pick the instruction set, cut the values into a slice per thread, join the slices' counts.
#include "filters/select.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "filters/select_cpu.h"

namespace prefkern {

PK_ISA_TABLE(SelectCpu, select_cpu)

namespace {

constexpr int64_t kValuesPerSlice = 1 << 15;

const SelectWalk<float>& walk(float) { return select_cpu().f32; }
const SelectWalk<double>& walk(double) { return select_cpu().f64; }

// f(slice, begin, end) for every slice of the values.
struct Slices {
  int64_t count, slices;
  explicit Slices(int64_t n) : count(n), slices(std::clamp<int64_t>(n / kValuesPerSlice, 1, num_threads())) {}
  template <class F> void each(const F& f) const {
    parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; s++) f(s, count / slices * s, s + 1 == slices ? count : count / slices * (s + 1));
    });
  }
};

// The value of a rank, and how many of those that count lie below it and are equal to it.
template <class S> struct Selected {
  S value;
  int64_t below, equal;
};

// What every pass needs of the one before.
template <class S> class Selection {
 public:
  explicit Selection(const SelectArgs<S>& args) : args_(args), slices_(args.count), histograms_(slices_.slices * kDigits) {
    nans_ = count(0, 0);
    for (int64_t n : total_) values_ += n;
  }
  int64_t values() const { return values_; }  // that count and are not NaN
  int64_t nans() const { return nans_; }
  const Slices& slices() const { return slices_; }

  // rank < values(). May be called once.
  Selected<S> select(int64_t rank) {
    typename OrderKey<S>::Type key = 0;
    int64_t below = 0, equal = 0;
    for (int pass = 0; pass < OrderKey<S>::passes; pass++) {
      if (pass > 0) count(key, pass);
      uint32_t d = 0;
      while (below + total_[d] <= rank) below += total_[d++];
      key |= static_cast<typename OrderKey<S>::Type>(d) << digit_shift<S>(pass);
      equal = total_[d];
    }
    return {order_value<S>(key), below, equal};
  }

  S next_above(S low) const {
    std::vector<S> least(slices_.slices);
    slices_.each([&](int64_t s, int64_t begin, int64_t end) { least[s] = walk(S()).next_above(args_, low, begin, end); });
    return *std::min_element(least.begin(), least.end());
  }

 private:
  // Into total_; returns the number of NaN.
  int64_t count(typename OrderKey<S>::Type chosen, int pass) {
    std::fill(histograms_.begin(), histograms_.end(), 0);
    std::vector<int64_t> nans(slices_.slices);
    slices_.each([&](int64_t s, int64_t begin, int64_t end) {
      nans[s] = walk(S()).count_digits(args_, chosen, pass, &histograms_[s * kDigits], begin, end);
    });
    total_.assign(histograms_.begin(), histograms_.begin() + kDigits);
    int64_t all = nans[0];
    for (int64_t s = 1; s < slices_.slices; s++) {
      for (int d = 0; d < kDigits; d++) total_[d] += histograms_[s * kDigits + d];
      all += nans[s];
    }
    return all;
  }

  const SelectArgs<S>& args_;
  Slices slices_;
  std::vector<int64_t> histograms_, total_;
  int64_t values_ = 0, nans_ = 0;
};

template <class S> void quantile(const SelectArgs<S>& a) {
  Selection<S> selection(a);
  *a.quantile = std::numeric_limits<S>::quiet_NaN();
  if (selection.nans() > 0 || selection.values() == 0) return;
  const QuantilePosition at = quantile_position(a.q, selection.values(), a.interpolation);
  const Selected<S> low = selection.select(at.rank);
  const bool high_is_low = at.weight == 0 || at.rank + 1 < low.below + low.equal;
  *a.quantile = interpolate(low.value, high_is_low ? low.value : selection.next_above(low.value), at.weight);
}

template <class S> void keep_largest(const SelectArgs<S>& a) {
  Selection<S> selection(a);
  const int64_t n = selection.values(), wanted = largest_count(a.fraction, n);
  if (wanted == 0) return void(std::fill(a.keep, a.keep + a.count, uint8_t(0)));
  const Selected<S> least = selection.select(n - wanted);
  const int64_t ties = wanted - (n - least.below - least.equal);
  const Slices& slices = selection.slices();
  std::vector<int64_t> before(slices.slices + 1);  // values equal to the least one in the slices before
  if (slices.slices > 1 && ties < least.equal)
    slices.each(
        [&](int64_t s, int64_t begin, int64_t end) { before[s + 1] = walk(S()).count_equal(a, least.value, begin, end); });
  for (int64_t s = 0; s < slices.slices; s++) before[s + 1] += before[s];
  slices.each([&](int64_t s, int64_t begin, int64_t end) {
    walk(S()).keep_above(a, least.value, std::max<int64_t>(0, ties - before[s]), begin, end);
  });
}

template <class S> void keep_from(const SelectArgs<S>& a) {
  Slices(a.count).each([&](int64_t, int64_t begin, int64_t end) { walk(S()).keep_from(a, *a.quantile, begin, end); });
}

}  // namespace

void cpu_quantile(const SelectArgs<float>& args) { quantile(args); }
void cpu_quantile(const SelectArgs<double>& args) { quantile(args); }
void cpu_keep_largest(const SelectArgs<float>& args) { keep_largest(args); }
void cpu_keep_largest(const SelectArgs<double>& args) { keep_largest(args); }
void cpu_keep_from(const SelectArgs<float>& args) { keep_from(args); }
void cpu_keep_from(const SelectArgs<double>& args) { keep_from(args); }

}  // namespace prefkern
