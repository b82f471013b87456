// philox.h for as many counters as a vector of the CPU has lanes: the same words.
#pragma once
#include "core/philox.h"
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

// The upper and lower halves of the 64-bit products of each lane and m.
PK_HD void multiply_words(VecU a, uint32_t m, VecU& high, VecU& low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), by = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  high = reinterpret_cast<VecU>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
  low = reinterpret_cast<VecU>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), by = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  high = reinterpret_cast<VecU>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  low = reinterpret_cast<VecU>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
  for (int i = 0; i < kLanes; i++) {
    const uint64_t product = uint64_t(m) * a[i];
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

struct PhiloxLanes {
  VecU word[4];
};
PK_HD PhiloxLanes philox(uint64_t seed, VecU c0, VecU c1, VecU c2, VecU c3) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    VecU a_high, a_low, b_high, b_low;
    multiply_words(c0, 0xD2511F53u, a_high, a_low);
    multiply_words(c2, 0xCD9E8D57u, b_high, b_low);
    const VecU n0 = b_high ^ c1 ^ key0, n2 = a_high ^ c3 ^ key1;
    c1 = b_low;
    c3 = a_low;
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace PK_ISA
}  // namespace prefkern
