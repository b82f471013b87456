// Functions that gp_posterior_cpu.cpp exports once per instruction set.
#pragma once
#include "gaussian/gp_posterior.h"

namespace prefkern {

struct GpPosteriorCpu {
  int64_t tile;  // candidates at a time
  // scale: [q] or null. scratch: (d + q) tiles. begin, end: tiles.
  void (*posterior)(const GpPosteriorArgs&, const double* scale, double* scratch, int64_t begin, int64_t end);
};
}  // namespace prefkern
