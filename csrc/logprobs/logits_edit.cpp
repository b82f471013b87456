// CPU entry points: pick the instruction set, share the rows out over torch's threads.
#include "logprobs/logits_edit.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "logprobs/logits_edit_cpu.h"

namespace prefkern {

PK_ISA_TABLE(LogitsEditCpu, logits_edit_cpu)

namespace {

// A task of fewer elements than this costs more to hand over than to do.
constexpr int64_t kElementsPerTask = 1 << 15;

template <class Args>
void over_rows(const Args& args, int64_t rows, int64_t cols, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, cols));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

template <class S> void kept_upstream(const KeptUpstreamArgs<S>& a) {
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t target = a.targets[row];
    a.out[row] = (a.kept.wide ? keeps<int64_t>(a.kept, row, target) : keeps<int32_t>(a.kept, row, target)) ? a.g[row] : S(0);
  }
}

}  // namespace

void cpu_round_logits(const RoundArgs& args) { over_rows(args, args.rows, args.cols, logits_edit_cpu().round); }
void cpu_keep_logits(const KeepArgs<float>& args) {
  over_rows(args, args.block.rows, args.block.cols, logits_edit_cpu().keep_f32);
}
void cpu_keep_logits(const KeepArgs<double>& args) {
  over_rows(args, args.block.rows, args.block.cols, logits_edit_cpu().keep_f64);
}
void cpu_kept_upstream(const KeptUpstreamArgs<float>& args) { kept_upstream(args); }
void cpu_kept_upstream(const KeptUpstreamArgs<double>& args) { kept_upstream(args); }

}  // namespace prefkern
