// Vectors of float, as wide as the instruction set this file is compiled for, with the few operations that plain C++
// lacks. GCC/Clang vector types take + - * / < > and ?: like scalars do, so a formula of csrc/math written for float
// works on them unchanged. Everything here is for CPU kernels (csrc/*/*_cpu.cpp), which are compiled once per ISA.
#pragma once
#include "core/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace prefkern {
inline namespace PK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));
constexpr int kWide = kLanes / 2;
typedef double VecD __attribute__((vector_size(kWide * 8)));

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// How a kernel sees one "register": its element type and how many elements it holds. double stays scalar: it exists
// for gradient checks.
template <class V> struct Lanes;
template <> struct Lanes<VecF> {
  using Scalar = float;
  static constexpr int count = kLanes;
};
template <> struct Lanes<double> {
  using Scalar = double;
  static constexpr int count = 1;
};
template <> struct Lanes<float> {
  using Scalar = float;
  static constexpr int count = 1;
};

// x - 0 is x for every x, and so costs nothing; x + 0 is not, for -0.
template <class V> PK_HD V splat(typename Lanes<V>::Scalar x) { return x - V{}; }

// ---- conversions ----------------------------------------------------------------------------------------------------
PK_HD float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
PK_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

PK_HD float to_float(float x) { return x; }
PK_HD float to_float(bf16_t x) { return bits_to_float(uint32_t(x.bits) << 16); }
PK_HD float to_float(f16_t x) {
#if defined(__aarch64__)
  __fp16 h;
  __builtin_memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
#else
  // Shift exponent and mantissa into place and scale by 2^112: exact, subnormals included. Inf and NaN are put back.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t magnitude = rest >= 0x0f800000u ? rest | 0x7f800000u : float_to_bits(bits_to_float(rest) * 0x1p112f);
  return bits_to_float(sign | magnitude);
#endif
}
PK_HD double to_float(double x) { return x; }

PK_HD bf16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(f);
  return {static_cast<uint16_t>(f != f ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
PK_HD f16_t to_f16(float f) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};                       // rounds to infinity
  if (a < 0x38800000u) {  // subnormal: let the adder round
    const float r = bits_to_float(a) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(r) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13))};
}

// ---- loads and stores -----------------------------------------------------------------------------------------------
template <class V> struct Mem;

template <> struct Mem<double> {
  template <class T> static PK_HD void load_pair(const T* p, double& a, double& b) {
    a = to_float(p[0]);
    b = to_float(p[1]);
  }
  template <class T> static PK_HD double load(const T* p) { return to_float(*p); }
  static PK_HD void store(double* p, double v) { *p = v; }
  static PK_HD void store_pair(double* p, double a, double b) {
    p[0] = a;
    p[1] = b;
  }
};

template <> struct Mem<float> {
  template <class T> static PK_HD float load(const T* p) { return to_float(*p); }
  static PK_HD void store(float* p, float v) { *p = v; }
  static PK_HD void store(bf16_t* p, float v) { *p = to_bf16(v); }
  static PK_HD void store(f16_t* p, float v) { *p = to_f16(v); }
};

template <> struct Mem<VecF> {
  // 2 kLanes elements, in whatever order is quickest; always the same.
  template <class T> static PK_HD void load_pair(const T* p, VecF& a, VecF& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  static PK_HD void load_pair(const bf16_t* p, VecF& a, VecF& b) {  // even and odd elements, on little-endian machines
    VecU both;
    __builtin_memcpy(&both, p, sizeof both);
    const VecU even = both << 16, odd = both & 0xffff0000u;
    __builtin_memcpy(&a, &even, sizeof a);
    __builtin_memcpy(&b, &odd, sizeof b);
  }
  static PK_HD VecF load(const float* p) {
    VecF v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static PK_HD VecF load(const bf16_t* p) {
    HalfBits h;
    __builtin_memcpy(&h, p, sizeof h);
    const VecU u = __builtin_convertvector(h, VecU) << 16;
    VecF v;
    __builtin_memcpy(&v, &u, sizeof v);
    return v;
  }
  static PK_HD VecF load(const f16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
    return reinterpret_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    VecF v;
    for (int i = 0; i < kLanes; i++) v[i] = to_float(p[i]);
    return v;
#endif
  }
  // What load_pair is the inverse of.
  template <class T> static PK_HD void store_pair(T* p, VecF a, VecF b) {
    store(p, a);
    store(p + kLanes, b);
  }
  static PK_HD void store_pair(bf16_t* p, VecF a, VecF b) {
    const VecU both = (rounded_half(a) >> 16) | (rounded_half(b) & 0xffff0000u);
    __builtin_memcpy(p, &both, sizeof both);
  }
  static PK_HD VecU rounded_half(VecF v) {  // to bf16 in the upper 16 bits, to nearest even; NaN stays NaN
    VecU u;
    __builtin_memcpy(&u, &v, sizeof u);
    return v == v ? u + 0x7fffu + (u >> 16 & 1u) : splat_bits(0x7fc00000u);
  }
  static PK_HD VecU splat_bits(uint32_t x) { return x - VecU{}; }
  static PK_HD void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
  static PK_HD void store(bf16_t* p, VecF v) {
#if defined(__AVX512BF16__)
    // Not cvtneps2bf16 alone: it flushes subnormals, and the result must not depend on the CPU.
    const __mmask16 tiny =
        _mm512_cmp_ps_mask(_mm512_abs_ps(reinterpret_cast<__m512>(v)), _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
    const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(h));
    if (__builtin_expect(tiny, 0))
      for (int i = 0; i < kLanes; i++)
        if (tiny >> i & 1) p[i] = to_bf16(v[i]);
#else
    const HalfBits h = __builtin_convertvector(rounded_half(v) >> 16, HalfBits);
    __builtin_memcpy(p, &h, sizeof h);
#endif
  }
  static PK_HD void store(f16_t* p, VecF v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes; i++) p[i] = to_f16(v[i]);
#endif
  }
};

// Which lanes of a vector count.
template <class V> struct Keep;
template <> struct Keep<double> {
  using Type = bool;
  static PK_HD bool load(const uint8_t* p) { return *p != 0; }
};
template <> struct Keep<VecF> {
  using Type = VecI;
  static PK_HD VecI load(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<VecI>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) != 0;
#elif defined(__AVX2__)
    return reinterpret_cast<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
#else
    VecI v;
    for (int i = 0; i < kLanes; i++) v[i] = p[i];
    return v != 0;
#endif
  }
};

// ---- the operations formulas need -----------------------------------------------------------------------------------
// vmax(a, b) is a > b ? a : b: where one of them is NaN, the result is b. Likewise vmin. vmax_nan is for an a that is no NaN:
// that of b passes.
PK_HD float vmax(float a, float b) { return a > b ? a : b; }
PK_HD double vmax(double a, double b) { return a > b ? a : b; }
PK_HD float vmin(float a, float b) { return a < b ? a : b; }
PK_HD double vmin(double a, double b) { return a < b ? a : b; }
#if defined(__AVX512F__)
PK_HD VecF vmax(VecF a, VecF b) {
  return reinterpret_cast<VecF>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
PK_HD VecF vmin(VecF a, VecF b) {
  return reinterpret_cast<VecF>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
PK_HD VecF vmax(VecF a, VecF b) {
  return reinterpret_cast<VecF>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
PK_HD VecF vmin(VecF a, VecF b) {
  return reinterpret_cast<VecF>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
PK_HD VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
PK_HD VecF vmin(VecF a, VecF b) { return a < b ? a : b; }
#endif
template <class V> PK_HD V vmax_nan(V a, V b) { return vmax(a, b); }

// 2^t for kFlushExponent <= t < 127, exactly 0 at kFlushExponent, NaN for NaN; results below 2^-126 are subnormal or 0. A
// polynomial on [-1/2, 1/2], fitted for least relative error with the constant term fixed at 1: of degree 5 in exp2_flush,
// relative error <= 1.9e-7 (3 ulp); of degree 4 in exp2_coarse, relative error <= 3e-6 (48 ulp).
#if defined(__AVX512F__)
constexpr float kFlushExponent = -151.0f;
PK_HD VecF times_exp2(VecF p, VecF f, VecF n) {  // (p f + 1) 2^n
  const __m512 q = _mm512_fmadd_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(f), _mm512_set1_ps(1.0f));
  return reinterpret_cast<VecF>(_mm512_scalef_ps(q, reinterpret_cast<__m512>(n)));
}
PK_HD VecF exp2_split(VecF t, VecF& f) {
  const VecF n =
      reinterpret_cast<VecF>(_mm512_roundscale_ps(reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  f = t - n;
  return n;
}
#else
constexpr float kFlushExponent = -127.0f;  // where 2^n has an exponent field of 0
PK_HD VecF times_exp2(VecF p, VecF f, VecF power) { return p * (f * power) + power; }
// f = t - n with the nearest integer n, and 2^n: adding 1.5 * 2^23 + 127 rounds, and leaves n + 127 in the low bits.
PK_HD VecF exp2_split(VecF t, VecF& f) {
  VecF magic = splat<VecF>(0x1.8p23f + 127);
#if defined(__x86_64__)
  __asm__("" : "+x"(magic));  // else the compiler holds its negative in a register too, and loops have none to spare
#endif
  const VecF shifted = t + magic;
  f = t - (shifted - magic);
  VecI bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const VecI power_bits = bits << 23;
  VecF power;
  __builtin_memcpy(&power, &power_bits, sizeof power);
  return power;
}
#endif
PK_HD VecF exp2_flush(VecF t) {
  constexpr float c1 = 0x1.62e42ap-1f, c2 = 0x1.ebf9bcp-3f, c3 = 0x1.c6b752p-5f, c4 = 0x1.3cea88p-7f, c5 = 0x1.5bba14p-10f;
  VecF f;
  const VecF n = exp2_split(t, f);
  return times_exp2((((f * c5 + c4) * f + c3) * f + c2) * f + c1, f, n);
}
PK_HD VecF exp2_coarse(VecF t) {
  constexpr float c1 = 0x1.62e12cp-1f, c2 = 0x1.ec0378p-3f, c3 = 0x1.c9fc46p-5f, c4 = 0x1.3a02ccp-7f;
  VecF f;
  const VecF n = exp2_split(t, f);
  return times_exp2(((f * c4 + c3) * f + c2) * f + c1, f, n);
}
PK_HD float exp2_flush(float t) { return t <= kFlushExponent ? 0.0f : __builtin_exp2f(t); }
PK_HD double exp2_flush(double t) { return __builtin_exp2(t); }

// e^x for every x: relative error <= 1.5e-7 where the result is normal, infinity on overflow, subnormals and 0 on
// underflow, NaN for NaN. x = n ln2 + f with ln2 in two parts, of which n times the first is exact, so that f is right
// without an fma too; a degree-6 polynomial for e^f on [-ln2/2, ln2/2], fitted for least relative error.
// tail: e^f - 1 - f, which for |x| < kExpTail is e^x - 1 - x, with a relative error <= 5e-7.
constexpr float kExpTail = 0.34f;
PK_HD VecF exp_tail(VecF x, VecF& tail) {
  constexpr float log2_e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  constexpr float c2 = 0x1.fffffcp-2f, c3 = 0x1.555492p-3f, c4 = 0x1.5558f2p-5f, c5 = 0x1.1239e2p-7f, c6 = 0x1.6a2434p-10f;
  // Outside [-104, 89] the result is 0 or infinity. Both bounds let NaN pass.
  const VecF bounded = vmin(splat<VecF>(89.0f), vmax(splat<VecF>(-104.0f), x));
#if defined(__AVX512F__)
  const VecF n = reinterpret_cast<VecF>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(bounded * log2_e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecF shifted = bounded * log2_e + 0x1.8p23f;
  const VecF n = shifted - 0x1.8p23f;
#endif
  const VecF f = (bounded - n * ln2_high) - n * ln2_low;
  tail = f * f * ((((f * c6 + c5) * f + c4) * f + c3) * f + c2);
  const VecF p = (tail + f) + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // 2^n as a product of two, since n reaches from -150 to 128.
  VecI bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const VecI whole = bits - 0x4b400000, half = whole >> 1;
  const VecI first_bits = (half + 127) << 23, second_bits = (whole - half + 127) << 23;
  VecF first, second;
  __builtin_memcpy(&first, &first_bits, sizeof first);
  __builtin_memcpy(&second, &second_bits, sizeof second);
  return p * first * second;
#endif
}
PK_HD VecF vexp(VecF x) {
  VecF tail;
  return exp_tail(x, tail);
}
PK_HD float vexp(float x) { return __builtin_expf(x); }
PK_HD double vexp(double x) { return __builtin_exp(x); }

// tanh with absolute error <= 2e-7: (1 - e) / (1 + e) with e = exp(-2|x|), and the Taylor polynomial near 0, where that
// quotient would cancel.
PK_HD VecF vtanh(VecF x) {
  const VecF a = vmin(vmax(x, -x), splat<VecF>(44.0f)), e = exp2_flush(a * -2.8853900817779268f), far = (1 - e) / (1 + e);
  const VecF a2 = a * a, near = a * (1 + a2 * (-0.333333333f + a2 * (0.133333333f + a2 * -0.053968254f)));
  const VecF r = a < 0.125f ? near : far;
  return x < 0 ? -r : (x == x ? r : x);
}
PK_HD float vtanh(float x) { return __builtin_tanhf(x); }
PK_HD double vtanh(double x) { return __builtin_tanh(x); }

// log x with relative error <= 2.5e-7: x = 2^n m with m in [sqrt 1/2, sqrt 2), log m = 2 artanh((m - 1) / (m + 1)) by its
// series. -infinity at 0, NaN below.
PK_HD VecF vlog(VecF x) {
  constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  const VecI tiny = x < 0x1p-126f;
  const VecF scaled = tiny ? x * 0x1p25f : x;
  VecI bits;
  __builtin_memcpy(&bits, &scaled, sizeof bits);
  const VecI n = (bits - 0x3f3504f3) >> 23, mantissa = bits - (n << 23);  // 0x3f3504f3 is sqrt 1/2
  VecF m;
  __builtin_memcpy(&m, &mantissa, sizeof m);
  const VecF s = (m - 1) / (m + 1), s2 = s * s;
  const VecF log_m = s * 2 + s * s2 * (0.666666667f + s2 * (0.4f + s2 * (0.285714286f + s2 * 0.222222222f)));
  const VecF e = __builtin_convertvector(n, VecF) - (tiny ? splat<VecF>(25.0f) : VecF{});
  const VecF r = e * ln2_high + (log_m + e * ln2_low), infinity = splat<VecF>(__builtin_inff());
  return x > 0 ? (x < infinity ? r : x) : (x == 0 ? -infinity : splat<VecF>(__builtin_nanf("")));
}

// log(1 + u) for finite u > -1: that of 1 + u as it is rounded, and what the rounding lost.
PK_HD VecF vlog1p(VecF u) {
  const VecF w = u + 1;
  return vlog(w) - ((w - 1) - u) / w;
}
PK_HD float vlog2(float x) { return __builtin_log2f(x); }
PK_HD double vlog2(double x) { return __builtin_log2(x); }
PK_HD float vlog(float x) { return __builtin_logf(x); }
PK_HD double vlog(double x) { return __builtin_log(x); }
PK_HD float vlog1p(float x) { return __builtin_log1pf(x); }
PK_HD double vlog1p(double x) { return __builtin_log1p(x); }
PK_HD double vsqrt(double x) { return __builtin_sqrt(x); }
PK_HD VecD vsqrt(VecD x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecD>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecD>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#else
  return VecD{vsqrt(x[0]), vsqrt(x[1])};
#endif
}

// ---- across lanes, always in the same order -------------------------------------------------------------------------
PK_HD float reduce_add(VecF v) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}
PK_HD float reduce_max(VecF v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}
// Added in double.
PK_HD double lane_sum(VecF v) {
  double s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}
PK_HD double lane_sum(double v) { return v; }
PK_HD float reduce_add(float v) { return v; }
PK_HD double reduce_add(double v) { return v; }
PK_HD float reduce_max(float v) { return v; }
PK_HD double reduce_max(double v) { return v; }

}  // namespace PK_ISA
}  // namespace prefkern
