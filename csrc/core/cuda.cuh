// Device side of core: element types, 16-byte loads and streaming stores, elementary functions, reductions over a block.
// tests/simt compiles this file for the CPU (PK_SIMT); kernels must therefore declare shared memory with PK_SMEM and
// launch with PK_LAUNCH.
#pragma once
#include "core/common.h"

#if defined(PK_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PK_SMEM(T, name, n) __shared__ T name[n]
#define PK_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace prefkern {
inline namespace PK_ISA {

using bf16_t = __nv_bfloat16;
using f16_t = __half;

template <class V> struct Lanes;
template <> struct Lanes<float> {
  using Scalar = float;
  static constexpr int count = 1;
};
template <class V> PK_HD V splat(float x) { return x; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(f16_t x) { return static_cast<float>(x); }

__device__ __forceinline__ float vmax(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float vmin(float a, float b) { return a < b ? a : b; }
constexpr float kFlushExponent = -151.0f;  // 2^t is exactly 0 here

// max_number passes over NaN, vmax_nan does not; vmax does in its first argument only.
__device__ __forceinline__ float max_number(float a, float b) { return fmaxf(a, b); }
#if defined(PK_SIMT)
__device__ __forceinline__ float vmax_nan(float a, float b) { return a != a ? a : vmax(a, b); }
__device__ __forceinline__ float exp2_flush(float t) { return exp2f(t); }
__device__ __forceinline__ float add_rounded(float a, float b) {
  volatile float product = a;
  return product + b;
}
#else
__device__ __forceinline__ float vmax_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Two ulp; 0 below 2^-126, where exp2f would spend instructions on denormals.
__device__ __forceinline__ float exp2_flush(float t) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(t));
  return r;
}
// A sum that is not fused with a product before it.
__device__ __forceinline__ float add_rounded(float a, float b) { return __fadd_rn(a, b); }
#endif
__device__ __forceinline__ float vexp(float x) { return expf(x); }
constexpr float kExpTail = 0.34f;  // see math/policy.h
__device__ __forceinline__ float vtanh(float x) { return tanhf(x); }
__device__ __forceinline__ float vlog2(float x) { return log2f(x); }
PK_HD double vsqrt(double x) { return sqrt(x); }
PK_HD double vexp(double x) { return exp(x); }
__device__ __forceinline__ float vlog(float x) { return logf(x); }
__device__ __forceinline__ float vlog1p(float x) { return log1pf(x); }
PK_HD double vlog(double x) { return log(x); }
PK_HD double vlog1p(double x) { return log1p(x); }
PK_HD double vmax(double a, double b) { return a > b ? a : b; }
PK_HD double vmin(double a, double b) { return a < b ? a : b; }

// ---- memory ---------------------------------------------------------------------------------------------------------
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// 16 bytes at once, read past the caches: every logit is used once.
template <class T> constexpr int kPackSize = 16 / sizeof(T);
template <class T> __device__ __forceinline__ Pack<T, kPackSize<T>> load_pack(const T* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  Pack<T, kPackSize<T>> out;
  memcpy(&out, &raw, 16);
  return out;
}
template <class T> __device__ __forceinline__ void store_pack(T* p, const Pack<T, kPackSize<T>>& value) {
  uint4 raw;
  memcpy(&raw, &value, 16);
  __stcs(reinterpret_cast<uint4*>(p), raw);
}
// Rounded to nearest even.
template <class O> __device__ __forceinline__ O narrow(float x) { return static_cast<O>(x); }
__device__ __forceinline__ void narrow_two(float a, float b, float* to) { to[0] = a, to[1] = b; }
#if defined(PK_SIMT)
template <class O> __device__ __forceinline__ void narrow_two(float a, float b, O* to) {
  to[0] = narrow<O>(a), to[1] = narrow<O>(b);
}
#else  // one instruction for both
__device__ __forceinline__ void narrow_two(float a, float b, bf16_t* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}
__device__ __forceinline__ void narrow_two(float a, float b, f16_t* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}
#endif
template <class O, int N> __device__ __forceinline__ Pack<O, N> narrow_pack(const float (&x)[N]) {
  static_assert(N % 2 == 0);
  Pack<O, N> r;
#pragma unroll
  for (int i = 0; i < N; i += 2) narrow_two(x[i], x[i + 1], r.v + i);
  return r;
}
PK_HD bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- reductions over a warp or a block, in a fixed order ------------------------------------------------------------
constexpr int kWarp = 32;

template <class T, class Merge> __device__ __forceinline__ T warp_reduce(T value, Merge merge) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) value = merge(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// `merge` must be commutative up to rounding; every thread gets the result.
template <int THREADS, class T, class Merge> __device__ __forceinline__ T block_reduce(T value, T identity, Merge merge) {
  constexpr int warps = THREADS / 32;
  PK_SMEM(T, partial, warps);
  value = warp_reduce(value, merge);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the array may still be read from an earlier reduction
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? partial[lane] : identity, merge);
}
struct Add {
  template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
__device__ __forceinline__ double warp_sum(double value) { return warp_reduce(value, Add()); }
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return vmax(a, b); }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return vmin(a, b); }
};

}  // namespace PK_ISA
}  // namespace prefkern
