// Vectors of double beside simd.h's vectors of float: loads and stores of some lanes, sums across lanes, an exponential.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

PK_HD VecD splat_wide(double x) { return x - VecD{}; }

// Loads and stores of the first n lanes, 0 < n <= kWide; lanes that are not loaded are 0.
#if defined(__AVX512F__)
PK_HD __mmask8 first_lanes(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
PK_HD VecD load_wide(const double* p, int64_t n) { return reinterpret_cast<VecD>(_mm512_maskz_loadu_pd(first_lanes(n), p)); }
PK_HD VecD load_wide(const float* p, int64_t n) {
  return reinterpret_cast<VecD>(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(n), p)));
}
PK_HD VecD keep_lanes(VecD v, int64_t n) {
  return reinterpret_cast<VecD>(_mm512_maskz_mov_pd(first_lanes(n), reinterpret_cast<__m512d>(v)));
}
PK_HD void store_wide(double* p, VecD v, int64_t n) { _mm512_mask_storeu_pd(p, first_lanes(n), reinterpret_cast<__m512d>(v)); }
PK_HD void store_wide(float* p, VecD v, int64_t n) {
  _mm256_mask_storeu_ps(p, first_lanes(n), _mm512_cvtpd_ps(reinterpret_cast<__m512d>(v)));
}
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) {
  _mm512_mask_storeu_epi64(p, first_lanes(n), _mm512_set1_epi64(size));
}
// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), of one vector and of as many as there are lanes.
PK_HD __m256d sum_quads(__m256d a, __m256d b, __m256d c, __m256d d) {
  const __m256d ab = _mm256_hadd_pd(a, b), cd = _mm256_hadd_pd(c, d);
  return _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31));
}
PK_HD __m256d low_half(VecD v) { return _mm512_castpd512_pd256(reinterpret_cast<__m512d>(v)); }
PK_HD __m256d high_half(VecD v) { return _mm512_extractf64x4_pd(reinterpret_cast<__m512d>(v), 1); }
PK_HD VecD sum_each(const VecD* v) {
  const __m256d low = _mm256_add_pd(sum_quads(low_half(v[0]), low_half(v[1]), low_half(v[2]), low_half(v[3])),
                                    sum_quads(high_half(v[0]), high_half(v[1]), high_half(v[2]), high_half(v[3])));
  const __m256d high = _mm256_add_pd(sum_quads(low_half(v[4]), low_half(v[5]), low_half(v[6]), low_half(v[7])),
                                     sum_quads(high_half(v[4]), high_half(v[5]), high_half(v[6]), high_half(v[7])));
  return reinterpret_cast<VecD>(_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1));
}
PK_HD double sum_lanes(VecD v) {
  const __m256d zero = _mm256_setzero_pd();
  return _mm256_cvtsd_f64(_mm256_add_pd(sum_quads(low_half(v), zero, zero, zero), sum_quads(high_half(v), zero, zero, zero)));
}
#elif defined(__AVX2__)
// n is a constant for whole vectors. Masked loads are cheap, masked stores are not.
PK_HD __m256i first_lanes(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
PK_HD __m128i first_words(int64_t n) { return _mm_cmpgt_epi32(_mm_set1_epi32(int(n)), _mm_setr_epi32(0, 1, 2, 3)); }
PK_HD VecD load_wide(const double* p, int64_t n) {
  return reinterpret_cast<VecD>(n == kWide ? _mm256_loadu_pd(p) : _mm256_maskload_pd(p, first_lanes(n)));
}
PK_HD VecD load_wide(const float* p, int64_t n) {
  return reinterpret_cast<VecD>(_mm256_cvtps_pd(n == kWide ? _mm_loadu_ps(p) : _mm_maskload_ps(p, first_words(n))));
}
PK_HD VecD keep_lanes(VecD v, int64_t n) {
  if (n == kWide) return v;
  return reinterpret_cast<VecD>(_mm256_and_pd(reinterpret_cast<__m256d>(v), _mm256_castsi256_pd(first_lanes(n))));
}
template <class T, class V> PK_HD void store_lanes(T* p, V v, int64_t n) {
  if (n == kWide) return void(__builtin_memcpy(p, &v, sizeof v));
  T x[kWide];
  __builtin_memcpy(x, &v, sizeof v);
  for (int64_t i = 0; i < n; i++) p[i] = x[i];
}
PK_HD void store_wide(double* p, VecD v, int64_t n) { store_lanes(p, v, n); }
PK_HD void store_wide(float* p, VecD v, int64_t n) { store_lanes(p, _mm256_cvtpd_ps(reinterpret_cast<__m256d>(v)), n); }
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) { store_lanes(p, _mm256_set1_epi64x(size), n); }
// (0 + 1) + (2 + 3), of one vector and of as many as there are lanes.
PK_HD VecD sum_each(const VecD* v) {
  const __m256d ab = _mm256_hadd_pd(reinterpret_cast<__m256d>(v[0]), reinterpret_cast<__m256d>(v[1]));
  const __m256d cd = _mm256_hadd_pd(reinterpret_cast<__m256d>(v[2]), reinterpret_cast<__m256d>(v[3]));
  return reinterpret_cast<VecD>(_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
}
PK_HD double sum_lanes(VecD v) {
  const __m256d pairs = _mm256_hadd_pd(reinterpret_cast<__m256d>(v), reinterpret_cast<__m256d>(v));
  return _mm_cvtsd_f64(_mm_add_sd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1)));
}
#else
template <class S> PK_HD VecD load_wide(const S* p, int64_t n) {
  return n == 1 ? VecD{double(p[0]), 0} : VecD{double(p[0]), double(p[1])};
}
PK_HD VecD keep_lanes(VecD v, int64_t n) { return n == 1 ? VecD{v[0], 0} : v; }
template <class S> PK_HD void store_wide(S* p, VecD v, int64_t n) {
  p[0] = S(v[0]);
  if (n > 1) p[1] = S(v[1]);
}
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) {
  p[0] = size;
  if (n > 1) p[1] = size;
}
PK_HD double sum_lanes(VecD v) { return v[0] + v[1]; }
PK_HD VecD sum_each(const VecD* v) { return VecD{v[0][0] + v[0][1], v[1][0] + v[1][1]}; }
#endif

// e^x for x <= 700 to about 1 ulp; exactly 0 below -708, where it would leave the normal range; NaN for NaN. x = n ln2 + f with
// ln2 in two parts, of which n times the first is exact, and the Taylor series of e^f to degree 13 on [-ln2/2, ln2/2].
typedef int64_t VecL __attribute__((vector_size(kWide * 8)));
PK_HD double vexp_falling(double x) { return x < -708 ? 0.0 : vexp(x); }
PK_HD VecD vexp_falling(VecD x) {
  constexpr double log2_e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr double inverse_factorial[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                          1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const VecD bounded = x < -708 ? splat_wide(-709.0) : x;
  const VecD shifted = bounded * log2_e + (0x1.8p52 + 1023), n = shifted - (0x1.8p52 + 1023);
  const VecD f = (bounded - n * ln2_high) - n * ln2_low;
  VecD series = splat_wide(inverse_factorial[11]);
#pragma GCC unroll 12
  for (int k = 10; k >= 0; k--) series = series * f + inverse_factorial[k];
  VecL bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);  // n + 1023 in the low ones
  const VecL power_bits = bits << 52;
  VecD power;
  __builtin_memcpy(&power, &power_bits, sizeof power);
  return (f * f * series + f) * power + power;
}

}  // namespace PK_ISA
}  // namespace prefkern
