// CPU entry points: pick the instruction set, count the tokens of each step, share sequences and features out over torch's
// threads.
#include "sequence/pooling.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "sequence/pooling_cpu.h"

namespace prefkern {

PK_ISA_TABLE(PoolingCpu, pooling_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

template <class S> using Part = void (*)(const PoolArgs<S>&, int64_t, int64_t);

int64_t grain(int64_t tasks, int64_t elements) {
  return std::max<int64_t>(1, kElementsPerTask * tasks / std::max<int64_t>(1, elements));
}

template <class S> void run(const PoolArgs<S>& a, Part<S> part) {
  const int64_t tasks = a.layout.sequences * std::max<int64_t>(1, ceil_div(a.features, kPoolFeatures));
  const auto body = [&](int64_t begin, int64_t end) { part(a, begin, end); };
  parallel_for(0, tasks, grain(tasks, a.layout.tokens * std::max<int64_t>(1, a.features)), body);
}

template <class S> void run_forward(const PoolArgs<S>& a, Part<S> count, Part<S> forward) {
  const auto body = [&](int64_t begin, int64_t end) { count(a, begin, end); };
  parallel_for(0, a.layout.sequences, grain(a.layout.sequences, a.layout.tokens), body);
  run(a, forward);
}

}  // namespace

void cpu_pool(const PoolArgs<float>& args) { run_forward(args, pooling_cpu().count_f32, pooling_cpu().forward_f32); }
void cpu_pool(const PoolArgs<double>& args) { run_forward(args, pooling_cpu().count_f64, pooling_cpu().forward_f64); }
void cpu_pool_backward(const PoolArgs<float>& args) { run(args, pooling_cpu().backward_f32); }
void cpu_pool_backward(const PoolArgs<double>& args) { run(args, pooling_cpu().backward_f64); }

}  // namespace prefkern
