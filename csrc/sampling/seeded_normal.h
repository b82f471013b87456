// Rows of standard normal numbers that are nowhere stored, for the CPU and for CUDA: they are computed from a seed where they are
// needed. Element e of row i of a seed is a function of (seed, i, e) alone, whichever tensor it is for and however that is cut:
//     words = philox(seed; e / 4 low, e / 4 high, i, 0);   words 0, 1 and 2, 3 make two numbers each (math/normal.h).
//
// S is the type the numbers are computed in: float, or double on the CPU.
#pragma once
#include "core/common.h"

namespace prefkern {

// out[j] = add_to[j] + scale sum_i weights[i] N(seed, first_row + i, first_element + j), added up in the order of the rows and
// rounded once. Memory is read and written once, whatever the number of rows.
template <class S> struct NormalArgs {
  uint64_t seed = 0;
  int64_t first_row = 0, rows = 0;  // first_row + rows <= 2^32
  const S* weights = nullptr;  // [rows]; null: all 1
  S scale = 1;
  int64_t first_element = 0, count = 0;
  DType dtype = DType::f32;  // of add_to and out
  const void* add_to = nullptr;  // [count], null for 0; may be out
  void* out = nullptr;  // [count]
};

// The words themselves, [blocks, 4], as the kernels make them: to look at.
struct PhiloxArgs {
  uint64_t seed = 0;
  int64_t row = 0, first_block = 0, blocks = 0;
  uint32_t* words = nullptr;
};

constexpr int64_t kNormalRows = int64_t(1) << 32;  // how many rows a seed has

PK_API void cpu_seeded_normal(const NormalArgs<float>& args);
PK_API void cpu_seeded_normal(const NormalArgs<double>& args);
PK_API void cpu_philox_words(const PhiloxArgs& args);
// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_seeded_normal(const NormalArgs<float>& args, void* stream);
PK_API int cuda_philox_words(const PhiloxArgs& args, void* stream);

}  // namespace prefkern
