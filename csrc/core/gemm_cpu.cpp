// A tile of C stays in registers while it runs along the dot products: tile_rows x 2 vectors of accumulators, and for every
// step one broadcast of A per row and two loads of B. Both operands are packed beforehand, so that each step reads on where
// the last one stopped: B in panels of 2 vectors, of which one at a time lives in the L1 cache, A in panels of tile_rows rows,
// of which a block lives in the L2 cache. Packing widens and transposes; it costs one pass per hundreds of multiplications.
//
// Every element of C is added up in the same order whatever its block: along k, in steps that depend on k alone. Results
// depend neither on threads nor on how C is cut.
#include "core/gemm_cpu.h"

#include "core/elementary_more.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kVectors = 2;  // of a row of a register tile
#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators of 32 registers
constexpr int64_t kBlockRows = 112;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
constexpr int64_t kBlockRows = 96;
#else
constexpr int kTileRows = 4;
constexpr int64_t kBlockRows = 96;
#endif
constexpr int kTileCols = kVectors * kLanes;
constexpr int64_t kDepth = 8192 / kTileCols < 256 ? 8192 / kTileCols : 256;  // a panel of B: 32 KiB at most, of the L1 cache
constexpr int64_t kBlockCols = 1024;

int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t depth_of(int64_t k) { return smaller(kDepth, round_up(k, kLanes)); }
int64_t packed_b_size(int64_t n, int64_t k) { return depth_of(k) * smaller(round_up(n, kTileCols), kBlockCols); }
// Panels of A are written a vector at a time: the last one reaches behind the end.
int64_t workspace(int64_t m, int64_t n, int64_t k) {
  const int64_t packed_a = depth_of(k) * smaller(round_up(m, kTileRows), kBlockRows);
  return round_up(packed_b_size(n, k) + packed_a + kLanes, 16);
}

// ---- what a step of the dot product multiplies ------------------------------------------------------------------------
// One float, or two bfloat16 as they lie in 32 bits.
struct One {
  static constexpr int depth = 1;
  static PK_HD VecF multiply_add(VecF c, VecF a, VecF b) { return c + a * b; }
};
struct Pair {
  static constexpr int depth = 2;
  static PK_HD VecF multiply_add(VecF c, VecF a, VecF b) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<VecF>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    return (c + high(a) * high(b)) + low(a) * low(b);
#endif
  }
  static PK_HD VecF high(VecF x) { return reinterpret_cast<VecF>(reinterpret_cast<VecU>(x) & 0xffff0000u); }
  static PK_HD VecF low(VecF x) { return reinterpret_cast<VecF>(reinterpret_cast<VecU>(x) << 16); }
};

// ---- packing ------------------------------------------------------------------------------------------------------------
// Vectors as the rows of a square matrix, which is transposed.
#if defined(__AVX2__) && !defined(__AVX512F__)
PK_HD void transpose(VecF (&v)[kLanes]) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = reinterpret_cast<__m256>(v[i]);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = reinterpret_cast<VecF>(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    v[i + 4] = reinterpret_cast<VecF>(_mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
// By exchanging off-diagonal squares of growing size.
template <int S> PK_HD void exchange(VecF& a, VecF& b) {
#if defined(__clang__)
  VecF x, y;
  for (int i = 0; i < kLanes; i++) {
    x[i] = i & S ? b[i - S] : a[i];
    y[i] = i & S ? b[i] : a[i + S];
  }
#else
  VecI first, second;
  for (int i = 0; i < kLanes; i++) {
    first[i] = i & S ? i - S + kLanes : i;
    second[i] = i & S ? i + kLanes : i + S;
  }
  const VecF x = __builtin_shuffle(a, b, first), y = __builtin_shuffle(a, b, second);
#endif
  a = x;
  b = y;
}
template <int S = 1> PK_HD void transpose(VecF (&v)[kLanes]) {
  if constexpr (S < kLanes) {
    for (int i = 0; i < kLanes; i++)
      if (!(i & S)) exchange<S>(v[i], v[i + S]);
    transpose<2 * S>(v);
  }
}
#endif

// The bits of a pair are a float to whoever only moves them.
template <class E> struct Source;
template <> struct Source<One> {
  template <class T> static PK_HD VecF vector(const T* row, int64_t k) { return Mem<VecF>::load(row + k); }
  template <class T> static PK_HD float element(const T* row, int64_t k, int64_t) { return to_float(row[k]); }
};
template <> struct Source<Pair> {
  static PK_HD VecF vector(const bf16_t* row, int64_t k) {
    return Mem<VecF>::load(reinterpret_cast<const float*>(row + 2 * k));
  }
  static PK_HD float element(const bf16_t* row, int64_t k, int64_t depth) {
    return bits_to_float(uint32_t(row[2 * k].bits) | (2 * k + 1 < depth ? uint32_t(row[2 * k + 1].bits) << 16 : 0u));
  }
};

// R rows of which each holds a dot product's elements, as [k][R]; those behind the last one are 0. Steps [k0, k0 + steps) of rows
// of `depth` elements. Up to a vector is written behind the panel.
template <class E, int R, class T>
void pack_rows(const T* source, int64_t stride, int64_t rows, int64_t k0, int64_t steps, int64_t depth, float* out) {
  constexpr int groups = (R + kLanes - 1) / kLanes;
  const int64_t whole = E::depth * (k0 + steps) <= depth ? steps : steps - 1;
  // A group of rows at a time: where rows lie a power of two apart, all of theirs share one set of the L1 cache.
  for (int g = 0; g < groups; g++)
    for (int64_t k = 0; k + kLanes <= whole; k += kLanes) {
      VecF v[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t r = g * kLanes + i;
        v[i] = r < rows && r < R ? Source<E>::vector(source + r * stride, k0 + k) : VecF{};
      }
      transpose(v);
      for (int i = 0; i < kLanes; i++) Mem<VecF>::store(out + (k + i) * R + g * kLanes, v[i]);
    }
  int64_t k = whole - whole % kLanes;
  for (; k < steps; k++)
    for (int64_t r = 0; r < R; r++) out[k * R + r] = r < rows ? Source<E>::element(source + r * stride, k0 + k, depth) : 0.0f;
}

// The same of rows that hold a step of many dot products: [k][R] is cut out of them. `panels` panels, one after the other.
template <int R, class T>
void pack_steps(const T* source, int64_t stride, int64_t rows, int64_t k0, int64_t steps, int64_t panel, float* out) {
  const int64_t panels = ceil_div(rows, R);
  for (int64_t k = 0; k < steps; k++) {
    const T* row = source + (k0 + k) * stride;
    for (int64_t p = 0; p < panels; p++) {
      float* to = out + p * panel + k * R;
      const int64_t first = p * R, here = smaller(R, rows - first);
      int64_t r = 0;
      // Whole vectors may reach into the next step, but not into the next panel.
      if (first + round_up(R, kLanes) <= rows && (R % kLanes == 0 || k + 1 < steps)) {
        for (; r < R; r += kLanes) Mem<VecF>::store(to + r, Mem<VecF>::load(row + first + r));
        continue;
      }
      for (; r < here; r++) to[r] = to_float(row[first + r]);
      for (; r < R; r++) to[r] = 0;
    }
  }
}

// Rows [first, first + rows) of an operand, in panels of R; `transposed`: they are columns in memory.
template <class E, int R, class T>
void pack(const T* source, int64_t stride, bool transposed, int64_t first, int64_t rows, int64_t k0, int64_t steps,
          int64_t depth, float* out) {
  const int64_t panel = steps * R;
  if constexpr (E::depth == 1) {
    if (transposed) return pack_steps<R>(source + first, stride, rows, k0, steps, panel, out);
  }
  for (int64_t r = 0; r < rows; r += R)
    pack_rows<E, R>(source + (first + r) * stride, stride, smaller(R, rows - r), k0, steps, depth, out + r / R * panel);
}

template <class E, int R>
void pack(const void* source, DType type, int64_t stride, bool transposed, int64_t first, int64_t rows, int64_t k0,
          int64_t steps, int64_t depth, float* out) {
  const auto run = [&](auto* p) { pack<E, R>(p, stride, transposed, first, rows, k0, steps, depth, out); };
  if constexpr (E::depth == 2) return run(static_cast<const bf16_t*>(source));
  else {
    switch (type) {
      case DType::f32: return run(static_cast<const float*>(source));
      case DType::bf16: return run(static_cast<const bf16_t*>(source));
      case DType::f16: return run(static_cast<const f16_t*>(source));
      case DType::f64: return;  // never
    }
  }
}

// ---- the register tile --------------------------------------------------------------------------------------------------
struct TileOut {
  float* c;
  int64_t stride, rows, cols;
  bool add;
  float alpha;
};

template <class E> PK_HD void tile(const float* a, const float* b, int64_t steps, const TileOut& out) {
  VecF c[kTileRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < kVectors; j++) c[i][j] = VecF{};
  // The rows of C lie far apart, often on pages of their own: they are on their way while the products are made.
  for (int64_t i = 0; i < out.rows; i++)
    for (int j = 0; j < kTileCols; j += 16) __builtin_prefetch(out.c + i * out.stride + j, 1);
  for (int64_t k = 0; k < steps; k++) {
    VecF right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) right[j] = Mem<VecF>::load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
      const VecF left = splat<VecF>(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) c[i][j] = E::multiply_add(c[i][j], left, right[j]);
    }
    a += kTileRows;
    b += kTileCols;
  }
  if (out.rows == kTileRows && out.cols == kTileCols) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        float* p = out.c + i * out.stride + j * kLanes;
        const VecF x = rounded_product(c[i][j], splat<VecF>(out.alpha));
        Mem<VecF>::store(p, out.add ? Mem<VecF>::load(p) + x : x);
      }
    }
    return;
  }
  alignas(64) float all[kTileRows * kTileCols];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++)
      Mem<VecF>::store(all + i * kTileCols + j * kLanes, rounded_product(c[i][j], splat<VecF>(out.alpha)));
  for (int64_t i = 0; i < out.rows; i++)
    for (int64_t j = 0; j < out.cols; j++) {
      float* p = out.c + i * out.stride + j;
      const float x = all[i * kTileCols + j];
      *p = out.add ? *p + x : x;
    }
}

template <class E> void multiply_as(const GemmArgs& g) {
  const int64_t steps = ceil_div(g.k, E::depth), parts = ceil_div(steps, kDepth),
                step = round_up(ceil_div(steps, parts), kLanes);
  float *packed_b = g.workspace, *packed_a = packed_b + packed_b_size(g.n, g.k);
  for (int64_t n0 = 0; n0 < g.n; n0 += kBlockCols) {
    const int64_t cols = smaller(kBlockCols, g.n - n0);
    for (int64_t k0 = 0; k0 < steps; k0 += step) {
      const int64_t here = smaller(step, steps - k0);
      const bool last = k0 + here == steps;
      pack<E, kTileCols>(g.b, g.b_type, g.b_stride, !g.b_transposed, n0, cols, k0, here, g.k, packed_b);
      for (int64_t m0 = 0; m0 < g.m; m0 += kBlockRows) {
        const int64_t rows = smaller(kBlockRows, g.m - m0);
        pack<E, kTileRows>(g.a, g.a_type, g.a_stride, g.a_transposed, m0, rows, k0, here, g.k, packed_a);
        for (int64_t j = 0; j < cols; j += kTileCols) {
          const float* panel = packed_b + j / kTileCols * here * kTileCols;
          for (int64_t i = 0; i < rows; i += kTileRows) {
            tile<E>(packed_a + i / kTileRows * here * kTileRows, panel, here,
                    {g.c + (m0 + i) * g.c_stride + n0 + j, g.c_stride, smaller(kTileRows, rows - i),
                     smaller(kTileCols, cols - j), k0 > 0 || g.accumulate, g.alpha});
          }
        }
        if (last && g.done) g.done(g.context, m0, rows, n0, cols);
      }
    }
  }
}

void multiply(const GemmArgs& g) { g.pairs ? multiply_as<Pair>(g) : multiply_as<One>(g); }

#if defined(__AVX2__)
constexpr bool kFast = true;
#else
constexpr bool kFast = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

}  // namespace

extern const GemmCpu gemm_cpu;
const GemmCpu gemm_cpu = {&multiply, &workspace, kTileRows, kTileCols, kFast, kPairs};

}  // namespace PK_ISA
}  // namespace prefkern
