// Functions that pooling_cpu.cpp exports once per instruction set.
#pragma once
#include "sequence/pooling.h"

namespace prefkern {

constexpr int64_t kPoolFeatures = 512;  // of a task: what is added up stays in the first-level cache

struct PoolingCpu {
  void (*count_f32)(const PoolArgs<float>&, int64_t begin, int64_t end);  // sequences
  void (*count_f64)(const PoolArgs<double>&, int64_t begin, int64_t end);
  // Tasks: sequence * (tiles of features) + tile.
  void (*forward_f32)(const PoolArgs<float>&, int64_t begin, int64_t end);
  void (*forward_f64)(const PoolArgs<double>&, int64_t begin, int64_t end);
  void (*backward_f32)(const PoolArgs<float>&, int64_t begin, int64_t end);
  void (*backward_f64)(const PoolArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
