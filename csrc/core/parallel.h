// Rows shared out over torch's own thread pool: torch.set_num_threads is obeyed and nothing is oversubscribed.
#pragma once
#include <cstdint>

#include "core/common.h"

namespace prefkern {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
PK_API int num_threads();

template <class F> void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_for_raw(
      begin, end, grain, [](int64_t b, int64_t e, void* c) { (*static_cast<const F*>(c))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace prefkern
