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

struct PhiloxLanes {
  VecW c0, c1, c2, c3;
  PK_HD void round(VecW key0, VecW key1) {
    const VecW a = low_product(c0, VecW{} + 0xD2511F53u), b = low_product(c2, VecW{} + 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ key0;
    c2 = (a >> 32) ^ c3 ^ key1;
    c1 = b;
    c3 = a;
  }
};

struct PhiloxVectors {
  VecU word[4];
};

// Lane 2 k belongs to block even[k], lane 2 k + 1 to odd[k].
PK_HD PhiloxVectors philox_lanes(uint64_t seed, VecW even, VecW odd, uint32_t row) {
  PhiloxLanes x = {even, even >> 32, VecW{} + row, VecW{}}, y = {odd, odd >> 32, VecW{} + row, VecW{}};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const VecW k0 = VecW{} + key0, k1 = VecW{} + key1;
    x.round(k0, k1);
    y.round(k0, k1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const auto join = [](VecW a, VecW b) {
    const VecW both = (a & 0xffffffffu) | (b << 32);
    return reinterpret_cast<VecU>(both);
  };
  return {{join(x.c0, y.c0), join(x.c1, y.c1), join(x.c2, y.c2), join(x.c3, y.c3)}};
}

}  // namespace PK_ISA
}  // namespace prefkern
