// Functions that chol_cpu.cpp exports once per instruction set.
#pragma once
#include "gaussian/chol.h"
#include "math/gaussian.h"

namespace prefkern {

struct CholCpu {
  void (*append)(const CholArgs&, double* scratch);                     // [size]
  void (*rank1)(const CholArgs&, RankOneStep* steps, double* scratch);  // [size] each
};
}  // namespace prefkern
