// Masks on the CPU: how many tokens count, and whether a vector of tokens needs a select at all.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

enum class Cover { none, some, all };
template <int N> PK_HD Cover cover(const uint8_t* p) {
  if (N < 4) return *p ? Cover::all : Cover::none;
  constexpr int words = N < 4 ? 1 : N / 4;
  uint32_t w[words];
  __builtin_memcpy(w, p, 4 * words);
  uint32_t any = 0, all = 0x01010101u;
  for (uint32_t x : w) {
    any |= x;
    all &= x;
  }
  return any == 0 ? Cover::none : all == 0x01010101u ? Cover::all : Cover::some;
}

PK_HD int64_t count_tokens(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  constexpr int64_t block = 128;  // so many bytes may be added up in a byte
  for (int64_t first = 0; first < n; first += block) {
    const int64_t last = first + block < n ? first + block : n;
    uint8_t here = 0;
    for (int64_t i = first; i < last; i++) here = static_cast<uint8_t>(here + (mask[i] != 0));
    count += here;
  }
  return count;
}

}  // namespace PK_ISA
}  // namespace prefkern
