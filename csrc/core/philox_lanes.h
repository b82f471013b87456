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

// ---- a tile: as many blocks of four numbers, one behind the other, as there are lanes -------------------------------------
constexpr int kQuads = kLanes / 4;

// Lane 4 q + k holds block kQuads k + q: so the four numbers of kQuads blocks come to lie one behind the other by exchanges
// within groups of four lanes.
constexpr int block_of_lane(int lane) { return kQuads * (lane % 4) + lane / 4; }

struct TileBlocks {
  VecW even, odd;
};
PK_HD TileBlocks tile_blocks(uint64_t first) {
  TileBlocks b;
  for (int i = 0; i < kLanes / 2; i++) {
    b.even[i] = uint64_t(block_of_lane(2 * i));
    b.odd[i] = uint64_t(block_of_lane(2 * i + 1));
  }
  return {b.even + first, b.odd + first};
}

// a[j] holds number j of each lane's block; afterwards a[0], a[1], ... are the numbers in their order.
template <class V> PK_HD void in_order(V (&a)[4]) {
#if defined(__AVX512F__)
#define PK_UNPACK(part, kind, x, y) _mm512_unpack##part##_##kind(x, y)
  using R = __m512;
  using D = __m512d;
#elif defined(__AVX2__)
#define PK_UNPACK(part, kind, x, y) _mm256_unpack##part##_##kind(x, y)
  using R = __m256;
  using D = __m256d;
#elif defined(__SSE2__)
#define PK_UNPACK(part, kind, x, y) _mm_unpack##part##_##kind(x, y)
  using R = __m128;
  using D = __m128d;
#endif
#if defined(PK_UNPACK)
  const R z0 = reinterpret_cast<R>(a[0]), z1 = reinterpret_cast<R>(a[1]), z2 = reinterpret_cast<R>(a[2]),
          z3 = reinterpret_cast<R>(a[3]);
  const D low01 = reinterpret_cast<D>(PK_UNPACK(lo, ps, z0, z1)), low23 = reinterpret_cast<D>(PK_UNPACK(lo, ps, z2, z3)),
          high01 = reinterpret_cast<D>(PK_UNPACK(hi, ps, z0, z1)), high23 = reinterpret_cast<D>(PK_UNPACK(hi, ps, z2, z3));
  a[0] = reinterpret_cast<V>(PK_UNPACK(lo, pd, low01, low23));
  a[1] = reinterpret_cast<V>(PK_UNPACK(hi, pd, low01, low23));
  a[2] = reinterpret_cast<V>(PK_UNPACK(lo, pd, high01, high23));
  a[3] = reinterpret_cast<V>(PK_UNPACK(hi, pd, high01, high23));
#undef PK_UNPACK
#else
  V b[4];
  for (int lane = 0; lane < kLanes; lane++)
    for (int j = 0; j < 4; j++) {
      const int at = 4 * block_of_lane(lane) + j;
      b[at / kLanes][at % kLanes] = a[j][lane];
    }
  for (int j = 0; j < 4; j++) a[j] = b[j];
#endif
}

}  // namespace PK_ISA
}  // namespace prefkern
