// Functions that select_cpu.cpp exports once per instruction set. All of them look at the values [begin, end).
#pragma once
#include "filters/select.h"

namespace prefkern {

template <class S> struct SelectWalk {
  using Key = typename OrderKey<S>::Type;
  // Adds to histogram[d] how many values have the digit d in this pass and, before it, the digits of `chosen`. Returns how
  // many are NaN; those are not in the histogram.
  int64_t (*count_digits)(const SelectArgs<S>&, Key chosen, int pass, int64_t* histogram, int64_t begin, int64_t end);
  // The smallest value that counts and is above `low`; infinity if there is none.
  S (*next_above)(const SelectArgs<S>&, S low, int64_t begin, int64_t end);
  int64_t (*count_equal)(const SelectArgs<S>&, S value, int64_t begin, int64_t end);
  // Keeps what counts and is above `value`, and the first `ties` of those equal to it.
  void (*keep_above)(const SelectArgs<S>&, S value, int64_t ties, int64_t begin, int64_t end);
  // Keeps what counts and is not below `value`.
  void (*keep_from)(const SelectArgs<S>&, S value, int64_t begin, int64_t end);
};

struct SelectCpu {
  SelectWalk<float> f32;
  SelectWalk<double> f64;
};
}  // namespace prefkern
