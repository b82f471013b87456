#include "core/parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace prefkern {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end, context);
  if (torch_parallel_for(begin, end, grain, body, context) != 0) throw std::runtime_error("prefkern: a parallel loop failed");
}

int num_threads() {
  uint32_t n = 1;
  if (torch_get_num_threads(&n) != 0) return 1;
  return static_cast<int>(n);
}

}  // namespace prefkern
