// What few formulas need beside elementary.h, chosen by the same rule.
#pragma once
#include "core/elementary.h"
#if !defined(__CUDACC__) && !defined(PK_SIMT)
#include "core/simd_wide.h"
#endif

namespace prefkern {
inline namespace PK_ISA {

// 2^x with results over the whole range, square roots, and e^x for x <= 700 (simd_wide.h).
#if !defined(__CUDACC__) && !defined(PK_SIMT)
PK_HD VecF exp2_any(VecF x) { return exp2_flush(vmin(splat<VecF>(126.0f), vmax(splat<VecF>(kFlushExponent), x))); }
PK_HD VecF sqrt_any(VecF x) {
  VecF r;
  for (int i = 0; i < kLanes; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
}
PK_HD float sqrt_any(float x) { return __builtin_sqrtf(x); }
PK_HD double exp2_any(double x) { return __builtin_exp2(x); }
#else
PK_HD float exp2_any(float x) { return exp2f(x); }
PK_HD float sqrt_any(float x) { return sqrtf(x); }
PK_HD double vexp_falling(double x) { return vexp(x); }
#endif
PK_HD double sqrt_any(double x) { return vsqrt(x); }

// Whether a b + c is one instruction, which rounds once, on the CPU this file is compiled for.
#if defined(__FMA__)
constexpr bool kMultiplyAdds = true;
#else
constexpr bool kMultiplyAdds = false;
#endif

// a b, rounded by itself: never part of a fused multiply-add with what is done to it next.
#if defined(__CUDA_ARCH__)
PK_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#else
template <class V> PK_HD V rounded_product(V a, V b) {
  V product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}
#endif

}  // namespace PK_ISA
}  // namespace prefkern
