// The fold of a tile of logits that tensor cores have left in registers, and the join of the tiles' parts. What a lane holds is
// what PTX lays down for the accumulators of wgmma.m64nNk16: of a row, columns 8 j + 2 (lane % 4) + {0, 1}, so that four adjacent
// lanes, a quad, hold a row among them. Plain arrays: it runs wherever such a tile is.
//
// The quad agrees on the row's maximum first and takes exponentials against it once; nothing is rescaled inside of a tile.
#pragma once
#include "core/cuda.cuh"
#include "logprobs/tile_fold.h"

namespace prefkern {
inline namespace PK_ISA {

constexpr int kQuad = 4;

// The column of a lane's i-th logit of a row.
PK_HD int tile_column(int lane, int i) { return 8 * (i / 2) + 2 * (lane % kQuad) + i % 2; }

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What a row's logits give: the same bits in all lanes of the quad.
struct TilePart {
  float max, s, u;
};

// Folds the lane's COUNT transformed logits of a row together with those of its quad. All lanes of the warp must call it.
template <int COUNT> __device__ __forceinline__ TilePart fold_quad(const float (&pre)[COUNT], float base2_factor) {
  static_assert(COUNT % 2 == 0);
  float max = pre[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) max = max_number(pre[i], max);
  max = max_number(__shfl_xor_sync(0xffffffffu, max, 1), max);
  max = max_number(__shfl_xor_sync(0xffffffffu, max, 2), max);
  // NaN only: the maximum is NaN, and so are the sums. -inf and NaN: as the fold over memory has it.
  SoftmaxSums<float> even, odd;  // two chains of sums, half as long
  if (max == kMinusInf<float>) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (pre[i] != pre[i]) even.s = pre[i];
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      softmax_add<true, false>(even, pre[i], max, base2_factor);
      softmax_add<true, false>(odd, pre[i + 1], max, base2_factor);
    }
  }
  return {max, quad_sum(even.s + odd.s), quad_sum(even.u + odd.u)};
}

// Folds the lane's COUNT raw logits of row `row` of the call, which lie in columns [first, first + 4 COUNT) of the weight's rows,
// and writes the quad's part of the tile, and the target's logit where the tile has it. All lanes of the warp must call it.
// PLAIN: neither bias nor softcap.
template <bool PLAIN, int COUNT>
__device__ __forceinline__ void fold_tile_row(const TileFoldArgs& a, int64_t row, int64_t tile, int lane, float (&pre)[COUNT]) {
  constexpr int columns = kQuad * COUNT;
  const LogitBlock<float>& b = a.block;
  const int64_t first = tile * columns;
  const bool within = row < b.rows;
  const int64_t known = within ? row : b.rows - 1;  // lanes beyond the last row take part, for the shuffles' sake
  if (!PLAIN && !is_plain(b.transform)) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int64_t col = first + tile_column(lane, i);
      pre[i] = pre_logit(b.transform, pre[i], b.transform.bias && col < b.cols ? b.transform.bias[col] : 0.0f);
    }
  }
  if (first + columns > b.cols) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (first + tile_column(lane, i) >= b.cols) pre[i] = kMinusInf<float>;
  }
  const TilePart part = fold_quad(pre, logit_factor(b.transform, known) * float(kLog2E));
  if (!within) return;
  const int64_t at = b.targets[row] - b.first_col - first;
  if (at >= 0 && at < columns && at + first < b.cols && at % 8 / 2 == lane % kQuad) {
    float target = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (tile_column(lane, i) == at) target = pre[i];
    a.target_pre[row] = target;
  }
  float* parts = a.parts + tile * kTileParts * b.rows + row;
  const int q = lane % kQuad;
  if (q < kTileParts) parts[q * b.rows] = q == 0 ? part.max : q == 1 ? part.s : part.u;
}

}  // namespace PK_ISA
}  // namespace prefkern
