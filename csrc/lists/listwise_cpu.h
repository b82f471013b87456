// Functions that listwise_cpu.cpp exports once per instruction set.
#pragma once
#include "lists/listwise.h"

namespace prefkern {

constexpr int64_t kListArrays = 8;  // scratch: so many arrays of K + 1 times kMostLanes

struct ListwiseCpu {
  // discounts: [K + 2], 1 / log(1 + rank) by rank.
  void (*lists_f32)(const ListArgs<float>&, const float* discounts, float* scratch, int64_t begin, int64_t end);
  void (*lists_f64)(const ListArgs<double>&, const double* discounts, double* scratch, int64_t begin, int64_t end);
};
}  // namespace prefkern
