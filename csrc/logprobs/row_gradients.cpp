// CPU entry points: pick the instruction set, share the rows out over torch's threads.
#include "logprobs/row_gradients.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "logprobs/row_gradients_cpu.h"

namespace prefkern {

PK_ISA_TABLE(RowGradientsCpu, row_gradients_cpu)

namespace {

// A task of fewer elements than this costs more to hand over than to do.
constexpr int64_t kElementsPerTask = 1 << 15;

template <class Args>
void over_rows(const Args& args, int64_t rows, int64_t cols, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, cols));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_weigh_logits(const WeighArgs<float>& a) { over_rows(a, a.block.rows, a.block.cols, row_gradients_cpu().weigh_f32); }
void cpu_weigh_logits(const WeighArgs<double>& a) { over_rows(a, a.block.rows, a.block.cols, row_gradients_cpu().weigh_f64); }
void cpu_finish_row_gradients(const RowGradientArgs<float>& a) {
  over_rows(a, a.block.rows, a.width, row_gradients_cpu().finish_f32);
}
void cpu_finish_row_gradients(const RowGradientArgs<double>& a) {
  over_rows(a, a.block.rows, a.width, row_gradients_cpu().finish_f64);
}
void cpu_row_backward(const RowBackwardArgs<float>& a) { over_rows(a, a.rows, a.width, row_gradients_cpu().backward_f32); }
void cpu_row_backward(const RowBackwardArgs<double>& a) { over_rows(a, a.rows, a.width, row_gradients_cpu().backward_f64); }

}  // namespace prefkern
