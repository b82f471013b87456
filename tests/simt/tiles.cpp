// Threads hold their logits as wgmma.m64nNk16 leaves accumulators: warp w of four has rows 16 w to 16 w + 15 of 64, a lane rows
// lane / 4 and 8 more. What lies beyond the matrix is the 0 that the memory accelerator fills in.
#include "tiles.h"

#include "core/cuda.cuh"
#include "logprobs/tile_fold.cuh"

using namespace prefkern;

namespace {

template <bool PLAIN, int COLUMNS> __global__ void tiles_kernel(TileFoldArgs a, const float* logits) {
  constexpr int count = COLUMNS / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int half = 0; half < 2; half++) {
    const int64_t row = int64_t(blockIdx.x) * 64 + warp * 16 + lane / 4 + 8 * half;
    float held[count];
    for (int i = 0; i < count; i++) {
      const int64_t col = int64_t(blockIdx.y) * COLUMNS + tile_column(lane, i);
      held[i] = row < a.block.rows && col < a.block.cols ? logits[row * a.block.cols + col] : 0.0f;
    }
    fold_tile_row<PLAIN>(a, row, blockIdx.y, lane, held);
  }
}

template <int COLUMNS> void run(const TileFoldArgs& a, const float* logits) {
  const dim3 grid(unsigned(ceil_div(a.block.rows, 64)), unsigned(ceil_div(a.block.cols, COLUMNS)));
  if (is_plain(a.block.transform)) PK_LAUNCH((tiles_kernel<true, COLUMNS>), grid, dim3(128), nullptr, a, logits);
  else PK_LAUNCH((tiles_kernel<false, COLUMNS>), grid, dim3(128), nullptr, a, logits);
}

}  // namespace

void run_tiles(const TileFoldArgs& args, const float* logits, int64_t columns) {
  if (columns == 32) run<32>(args, logits);
  else if (columns == 192) run<192>(args, logits);
  else if (columns == 256) run<256>(args, logits);
  else throw simt::Error("no tiles of " + std::to_string(columns) + " columns");
}
