// Order statistics of the values that count, and which values lie above one: exact, without sorting, for the CPU and for
// CUDA. Values are read as integers of the same order and the wanted one is found a digit at a time, by counting how many
// values have which digit. Counts are integers: results do not depend on the number of threads.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/quantile.h"

namespace prefkern {

template <class S> struct SelectArgs {
  int64_t count = 0;              // values, in the order of memory
  const S* values = nullptr;
  const uint8_t* mask = nullptr;  // null: every value counts
  double q = 0;                   // of quantile
  Interpolation interpolation = Interpolation::linear;
  double fraction = 0;            // of keep_largest
  S* quantile = nullptr;          // one value: written by quantile, read by keep_from
  uint8_t* keep = nullptr;        // [count]: written by keep_largest and keep_from
  int64_t* workspace = nullptr;   // CUDA: select_workspace(count) zeros
};

// quantile: the q-quantile; NaN if no value counts or one of them is NaN.
// keep_largest: exactly the largest `fraction`, rounded up, of the values that are not NaN; of equal ones, the first.
// keep_from: all values that count and are not below *quantile; none if that is NaN.
PK_API void cpu_quantile(const SelectArgs<float>& args);
PK_API void cpu_quantile(const SelectArgs<double>& args);
PK_API void cpu_keep_largest(const SelectArgs<float>& args);
PK_API void cpu_keep_largest(const SelectArgs<double>& args);
PK_API void cpu_keep_from(const SelectArgs<float>& args);
PK_API void cpu_keep_from(const SelectArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_quantile(const SelectArgs<float>& args, void* stream);
PK_API int cuda_keep_largest(const SelectArgs<float>& args, void* stream);
PK_API int cuda_keep_from(const SelectArgs<float>& args, void* stream);

// Blocks that share the values on CUDA, and 8-byte words they need: the counts of every digit, what is known of the wanted
// value, and a count per block.
constexpr int64_t kSelectStateWords = 16;
PK_HD int64_t select_blocks(int64_t count) {
  const int64_t blocks = ceil_div(count, 1 << 13);
  return blocks < 1 ? 1 : blocks < 512 ? blocks : 512;
}
PK_HD int64_t select_workspace(int64_t count) {
  return OrderKey<float>::passes * kDigits + kSelectStateWords + select_blocks(count);
}

}  // namespace prefkern
