// Runs CUDA kernels on the CPU, for tests: include this instead of cuda_runtime.h. Every CUDA thread is a fiber
// (simt.cpp), which runs until it reaches a barrier, a warp operation or its end; the blocks of a grid run one after
// another. The order of threads and blocks can be chosen: a kernel whose result depends on it has a race. In random
// order a block may also be held up after an atomic operation until the others are done: what it has not written by
// then must not matter to them.
//
// What leaves a GPU with undefined behaviour, and can be seen from here, is an Error: a barrier reached from different
// lines; a warp operation whose lanes do not match its mask; threads that wait for others forever; a write outside a
// shared array; a misaligned vector load; a launch that no GPU accepts. Shared memory starts out as NaN.
//
// Not modelled: time, weak memory ordering, blocks that wait for one another, asynchronous copies, tensor cores.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// `name` is a reference to an array, so that sizeof and the bounds checks of a sanitizer see its length. The static
// variable tells the arrays of a kernel apart; a function template has one per instantiation, as it has with nvcc.
#define PK_SMEM(T, name, n)    \
  static char name##_simt_tag; \
  T(&name)[n] = *static_cast<T(*)[n]>(simt::shared_array(&name##_simt_tag, sizeof(T[n]), alignof(T)))
#define PK_LAUNCH(kernel, grid, block, stream, ...) simt::launch(kernel, grid, block, stream, __VA_ARGS__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
#define CUDART_VERSION 0
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "unknown error";
}

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- what simt.cpp does ---------------------------------------------------------------------------------------------
enum class Order { forward, reverse, random };
void set_order(Order order, uint64_t seed);  // of the threads of a block, and of the blocks

void run(dim3 grid, dim3 block, const std::function<void()>& thread);
uint64_t launches();  // so far
void* shared_array(const void* tag, size_t bytes, size_t alignment);
void sync_block(const char* file, int line);
void after_atomic();

// One operation of all the lanes in `mask`. A shuffle replaces `value` by that of lane `source`; a ballot takes a
// uint32_t, 0 or 1, and gives one.
enum class WarpOp { sync, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot };
void warp_operation(WarpOp op, uint32_t mask, void* value, size_t size, unsigned source);
inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize; }

// ---- templates over it ----------------------------------------------------------------------------------------------
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t, const Args&... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel arguments reach the device as bytes");
  run(grid, block, [&] { kernel(args...); });
}

template <class T> T shuffle(WarpOp op, uint32_t mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "not a type that CUDA shuffles");
  warp_operation(op, mask, &value, sizeof(T), source);
  return value;
}

template <class T> T aligned_load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0)
    throw Error("misaligned load of " + std::to_string(sizeof(T)) + " bytes");
  return *p;
}
template <class T> void aligned_store(T* p, const T& value) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0)
    throw Error("misaligned store of " + std::to_string(sizeof(T)) + " bytes");
  *p = value;
}

template <class To, class From> To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T> using Same = std::common_type_t<T>;  // keeps an argument out of template argument deduction

}  // namespace simt

// ---- barriers and warp operations -----------------------------------------------------------------------------------
#define __syncthreads() simt::sync_block(__FILE__, __LINE__)

inline void __syncwarp(uint32_t mask = 0xffffffffu) { simt::warp_operation(simt::WarpOp::sync, mask, nullptr, 0, 0); }

// The lanes are cut into segments of `width`, a power of two; a source outside the caller's own segment is the caller.
template <class T> T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize) {
  const unsigned segment = simt::lane() & ~(width - 1u);
  return simt::shuffle(simt::WarpOp::shuffle, mask, value, segment | (source & (width - 1u)));
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize) {
  const unsigned me = simt::lane(), source = me ^ static_cast<unsigned>(bits), segment_end = (me | (width - 1u)) + 1;
  return simt::shuffle(simt::WarpOp::shuffle_xor, mask, value, source < segment_end ? source : me);
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = warpSize) {
  const unsigned me = simt::lane();
  return simt::shuffle(simt::WarpOp::shuffle_up, mask, value, (me & (width - 1u)) >= distance ? me - distance : me);
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = warpSize) {
  const unsigned me = simt::lane(), in_segment = me & (width - 1u);
  const bool inside = in_segment + distance < static_cast<unsigned>(width);
  return simt::shuffle(simt::WarpOp::shuffle_down, mask, value, inside ? me + distance : me);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  uint32_t value = predicate != 0;
  simt::warp_operation(simt::WarpOp::ballot, mask, &value, sizeof(value), 0);
  return value;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- memory ---------------------------------------------------------------------------------------------------------
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class T> T __ldg(const T* p) { return simt::aligned_load(p); }
template <class T> T __ldcs(const T* p) { return simt::aligned_load(p); }
template <class T> void __stcs(T* p, const simt::Same<T>& value) { simt::aligned_store(p, value); }

// Fibers are never interrupted, so plain reads and writes are atomic.
template <class T> T atomicExch(T* p, simt::Same<T> value) {
  const T old = *p;
  *p = value;
  simt::after_atomic();
  return old;
}
template <class T> T atomicAdd(T* p, simt::Same<T> value) { return atomicExch(p, static_cast<T>(*p + value)); }
template <class T> T atomicMin(T* p, simt::Same<T> value) { return atomicExch(p, value < *p ? value : *p); }
template <class T> T atomicMax(T* p, simt::Same<T> value) { return atomicExch(p, value > *p ? value : *p); }
template <class T> T atomicCAS(T* p, simt::Same<T> expected, simt::Same<T> value) {
  return atomicExch(p, *p == expected ? value : *p);
}
inline unsigned atomicInc(unsigned* p, unsigned last) { return atomicExch(p, *p >= last ? 0 : *p + 1); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }

// 2-byte floats round to nearest even; NaN becomes CUDA's canonical one.
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const uint32_t u = __float_as_uint(x);
    bits = static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  __half(float x) {
    const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, u = __float_as_uint(fabsf(x));
    uint32_t magnitude;
    if (x != x) magnitude = 0x7fff;
    else if (u >= __float_as_uint(65520.0f)) magnitude = 0x7c00;
    else if (u < __float_as_uint(0x1p-14f)) magnitude = __float_as_uint(fabsf(x) + 0.5f) - __float_as_uint(0.5f);
    else magnitude = (u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13;
    bits = static_cast<uint16_t>(x != x ? magnitude : sign | magnitude);
  }
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const bool finite = rest < 0x0f800000;
    return __uint_as_float(sign | (finite ? __float_as_uint(__uint_as_float(rest) * 0x1p112f) : rest | 0x7f800000));
  }
};
