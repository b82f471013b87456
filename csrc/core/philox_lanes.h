// Philox4x32-10 (core/philox.h) for as many counters at once as a vector of floats has lanes. For CPU kernels.
#pragma once
#include "core/philox.h"
#include "core/simd.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace prefkern {
inline namespace PK_ISA {

// Counters lie in the lower halves of 64-bit lanes, even and odd ones apart: the only multiplication of 32 by 32 bits into 64
// that x86 has takes them from there, and whatever is in the upper halves does not matter.
typedef uint64_t VecW __attribute__((vector_size(kLanes * 4)));

PK_HD VecW low_product(VecW a, VecW b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecW>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecW>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecW>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

struct PhiloxHalf {
  VecW c0, c1, c2, c3;
  PK_HD void round(VecW key0, VecW key1) {
    const VecW a = low_product(c0, VecW{} + 0xD2511F53u), b = low_product(c2, VecW{} + 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ key0;
    c2 = (a >> 32) ^ c3 ^ key1;
    c1 = b;
    c3 = a;
  }
};

struct PhiloxLanes {
  VecU word[4];
};

// Even and odd lanes apart, for as long as it takes.
PK_HD PhiloxLanes philox(uint64_t seed, PhiloxHalf even, PhiloxHalf odd) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const VecW k0 = VecW{} + key0, k1 = VecW{} + key1;
    even.round(k0, k1);
    odd.round(k0, k1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const auto join = [](VecW a, VecW b) {
    const VecW both = (a & 0xffffffffu) | (b << 32);
    return reinterpret_cast<VecU>(both);
  };
  return {{join(even.c0, odd.c0), join(even.c1, odd.c1), join(even.c2, odd.c2), join(even.c3, odd.c3)}};
}

PK_HD PhiloxLanes philox(uint64_t seed, VecU c0, VecU c1, VecU c2, VecU c3) {
  const PhiloxHalf even = {reinterpret_cast<VecW>(c0), reinterpret_cast<VecW>(c1), reinterpret_cast<VecW>(c2),
                           reinterpret_cast<VecW>(c3)};
  return philox(seed, even, {even.c0 >> 32, even.c1 >> 32, even.c2 >> 32, even.c3 >> 32});
}

// Lane 2 k belongs to block even[k], lane 2 k + 1 to odd[k].
PK_HD PhiloxLanes philox_blocks(uint64_t seed, VecW even, VecW odd, uint32_t row) {
  return philox(seed, PhiloxHalf{even, even >> 32, VecW{} + row, VecW{}}, PhiloxHalf{odd, odd >> 32, VecW{} + row, VecW{}});
}

}  // namespace PK_ISA
}  // namespace prefkern
