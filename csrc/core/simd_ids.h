// Integer ids compared as vectors.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

// Whether n ids are equal.
template <int N> PK_HD bool equal_ids(const int64_t* ids) {
  typedef int64_t VecL __attribute__((vector_size(kWide * 8)));
  VecL differ = {};
  for (int p = 0; p < N; p += kWide) {
    VecL v;
    __builtin_memcpy(&v, ids + p, sizeof v);
    differ |= v ^ (VecL{} + ids[0]);
  }
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(differ), reinterpret_cast<__m512i>(differ)) == 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(reinterpret_cast<__m256i>(differ), reinterpret_cast<__m256i>(differ));
#else
  return (differ[0] | differ[1]) == 0;
#endif
}
PK_HD bool equal_ids(const int64_t* ids, int64_t n) {
  if (n == 8) return equal_ids<8>(ids);
  if (n == 16) return equal_ids<16>(ids);
  int64_t differ = 0;
  for (int64_t k = 1; k < n; k++) differ |= ids[k] ^ ids[0];
  return differ == 0;
}

// Bit k: whether a[k] == b[k], for k < n <= 64.
#if defined(__AVX512F__)
PK_HD uint64_t equal_bits(const int64_t* a, const int64_t* b, int64_t n) {
  uint64_t bits = 0;
  for (int64_t k = 0; k < n; k += 8) {
    const auto lanes = static_cast<__mmask8>(n - k < 8 ? (1u << (n - k)) - 1 : 0xffu);
    const __m512i x = _mm512_maskz_loadu_epi64(lanes, a + k), y = _mm512_maskz_loadu_epi64(lanes, b + k);
    bits |= uint64_t(_mm512_mask_cmpeq_epi64_mask(lanes, x, y)) << k;
  }
  return bits;
}
PK_HD uint64_t equal_bits(const int32_t* a, const int32_t* b, int64_t n) {
  uint64_t bits = 0;
  for (int64_t k = 0; k < n; k += 16) {
    const auto lanes = static_cast<__mmask16>(n - k < 16 ? (1u << (n - k)) - 1 : 0xffffu);
    const __m512i x = _mm512_maskz_loadu_epi32(lanes, a + k), y = _mm512_maskz_loadu_epi32(lanes, b + k);
    bits |= uint64_t(_mm512_mask_cmpeq_epi32_mask(lanes, x, y)) << k;
  }
  return bits;
}
#else
#if defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
PK_HD uint64_t equal_lanes(const int64_t* a, const int64_t* b) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return uint64_t(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(x, y))));
}
PK_HD uint64_t equal_lanes(const int32_t* a, const int32_t* b) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return uint64_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, y))));
}
#else
constexpr int64_t kVectorBytes = 0;
template <class T> PK_HD uint64_t equal_lanes(const T*, const T*) { return 0; }
#endif
template <class T> PK_HD uint64_t equal_bits(const T* a, const T* b, int64_t n) {
  constexpr int64_t lanes = kVectorBytes / int64_t(sizeof(T));
  uint64_t bits = 0;
  int64_t k = 0;
  if (lanes > 0)
    for (; k + lanes <= n; k += lanes) bits |= equal_lanes(a + k, b + k) << k;
  for (; k < n; k++) bits |= uint64_t(a[k] == b[k]) << k;
  return bits;
}
#endif

}  // namespace PK_ISA
}  // namespace prefkern
