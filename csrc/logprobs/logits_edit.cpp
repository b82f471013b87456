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

template <class Args> void over_rows(const Args& args, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, args.cols));
  parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_round_logits(const RoundArgs& args) { over_rows(args, logits_edit_cpu().round); }

}  // namespace prefkern
