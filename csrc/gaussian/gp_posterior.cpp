// CPU entry point of gp_posterior.h: pick the instruction set, share the tiles out over torch's threads.
#include "gaussian/gp_posterior.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "gaussian/gp_posterior_cpu.h"

namespace prefkern {

PK_ISA_TABLE(GpPosteriorCpu, gp_posterior_cpu)

namespace {
constexpr int64_t kWorkPerTask = 1 << 16;  // multiply-adds
}

void cpu_gp_posterior(const GpPosteriorArgs& a) {
  std::vector<double> scale(a.counts ? a.points : 0);
  for (size_t i = 0; i < scale.size(); i++) scale[i] = std::sqrt(double(a.counts[i]));
  const int64_t tile = gp_posterior_cpu().tile, work = tile * (1 + a.points * (a.points / 2 + a.dims + 16));
  parallel_for(0, ceil_div(a.candidates, tile), std::max<int64_t>(1, kWorkPerTask / work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[(a.dims + a.points) * tile]);
    gp_posterior_cpu().posterior(a, a.counts ? scale.data() : nullptr, scratch.get(), begin, end);
  });
}

}  // namespace prefkern
