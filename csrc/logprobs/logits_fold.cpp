// CPU entry points: pick the instruction set, share the rows out over torch's threads.
#include "logprobs/logits_fold.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "logprobs/logits_fold_cpu.h"

namespace prefkern {

PK_ISA_TABLE(LogitsFoldCpu, logits_fold_cpu)

namespace {

// A task of fewer elements than this costs more to hand over than to do.
constexpr int64_t kElementsPerTask = 1 << 15;

template <class Args> void over_rows(const Args& args, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, args.block.cols));
  parallel_for(0, args.block.rows, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_fold_logits(const FoldArgs<float>& args) { over_rows(args, logits_fold_cpu().fold_f32); }
void cpu_fold_logits(const FoldArgs<double>& args) { over_rows(args, logits_fold_cpu().fold_f64); }
void cpu_grad_logits(const GradArgs<float>& args) { over_rows(args, logits_fold_cpu().grad_f32); }
void cpu_grad_logits(const GradArgs<double>& args) { over_rows(args, logits_fold_cpu().grad_f64); }

}  // namespace prefkern
