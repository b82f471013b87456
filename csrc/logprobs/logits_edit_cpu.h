// Functions that logits_edit_cpu.cpp exports once per instruction set.
#pragma once
#include "logprobs/logits_edit.h"

namespace prefkern {
struct LogitsEditCpu {
  void (*round)(const RoundArgs&, int64_t row_begin, int64_t row_end);
  void (*keep_f32)(const KeepArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*keep_f64)(const KeepArgs<double>&, int64_t row_begin, int64_t row_end);
};
}  // namespace prefkern
