// CPU entry points: pick the instruction set, share the sequences out over torch's threads.
#include "sequence/sequence_sums.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "sequence/sequence_sums_cpu.h"

namespace prefkern {

PK_ISA_TABLE(SequenceSumsCpu, sequence_sums_cpu)

namespace {

constexpr int64_t kTokensPerTask = 1 << 15;

template <class S> void run(const SequenceSumArgs<S>& args, void (*sequences)(const SequenceSumArgs<S>&, int64_t, int64_t)) {
  const int64_t count = args.layout.sequences;
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * count / std::max<int64_t>(1, args.layout.tokens));
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { sequences(args, begin, end); });
}

}  // namespace

void cpu_sequence_sums(const SequenceSumArgs<float>& args) { run(args, sequence_sums_cpu().forward_f32); }
void cpu_sequence_sums(const SequenceSumArgs<double>& args) { run(args, sequence_sums_cpu().forward_f64); }
void cpu_sequence_sums_backward(const SequenceSumArgs<float>& args) { run(args, sequence_sums_cpu().backward_f32); }
void cpu_sequence_sums_backward(const SequenceSumArgs<double>& args) { run(args, sequence_sums_cpu().backward_f64); }

}  // namespace prefkern
