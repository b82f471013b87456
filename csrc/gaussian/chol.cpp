// CPU entry points of chol.h: pick the instruction set.
#include "gaussian/chol.h"

#include <memory>

#include "core/isa.h"
#include "gaussian/chol_cpu.h"

namespace prefkern {

PK_ISA_TABLE(CholCpu, chol_cpu)

void cpu_chol_append(const CholArgs& a) {
  const std::unique_ptr<double[]> scratch(new double[a.size]);
  chol_cpu().append(a, scratch.get());
}

void cpu_chol_rank1(const CholArgs& a) {
  const std::unique_ptr<double[]> scratch(new double[a.size]);
  const std::unique_ptr<RankOneStep[]> steps(new RankOneStep[a.size]);
  chol_cpu().rank1(a, steps.get(), scratch.get());
}

}  // namespace prefkern
