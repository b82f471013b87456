// The fold of tiles that tensor cores leave in registers, with memory in place of the tensor cores.
#pragma once
#include "logprobs/tile_fold.h"

// float32 logits [rows, cols], adjacent rows; tiles of 32, 192 or 256 columns.
void run_tiles(const prefkern::TileFoldArgs& args, const float* logits, int64_t columns);
