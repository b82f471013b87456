// CPU entry points.
#include "logprobs/active_rows.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"

namespace prefkern {
namespace {

template <class S> void active_targets(const ActiveTargetsArgs<S>& a) {
  for (int64_t row = 0; row < a.rows; row++) a.out[row] = active_target(a, row);
}

// A task of fewer bytes than this costs more to hand over than to do.
constexpr int64_t kBytesPerTask = 1 << 17, kLine = 64;

// Rows move past each other, and so threads share out the columns.
template <class F> void over_columns(int64_t row_bytes, int64_t rows, F&& body) {
  const int64_t lines = ceil_div(row_bytes, kLine),
                grain = std::max<int64_t>(1, kBytesPerTask / (kLine * std::max<int64_t>(1, rows)));
  parallel_for(0, lines, grain,
               [&](int64_t begin, int64_t end) { body(begin * kLine, std::min(end * kLine, row_bytes) - begin * kLine); });
}

}  // namespace

void cpu_active_targets(const ActiveTargetsArgs<float>& args) { active_targets(args); }
void cpu_active_targets(const ActiveTargetsArgs<double>& args) { active_targets(args); }

void cpu_compact_rows(void* matrix, int64_t row_bytes, const int64_t* from, int64_t rows) {
  over_columns(row_bytes, rows, [&](int64_t first, int64_t bytes) {
    char* base = static_cast<char*>(matrix) + first;
    for (int64_t k = 0; k < rows; k++)
      if (from[k] != k) std::memcpy(base + k * row_bytes, base + from[k] * row_bytes, size_t(bytes));
  });
}

void cpu_spread_rows(void* matrix, int64_t row_bytes, const int64_t* to, int64_t rows, int64_t total) {
  over_columns(row_bytes, total, [&](int64_t first, int64_t bytes) {
    char* base = static_cast<char*>(matrix) + first;
    for (int64_t row = total - 1, k = rows - 1; row >= 0; row--) {  // from the last: what is overwritten has moved
      if (k < 0 || to[k] != row) {
        std::memset(base + row * row_bytes, 0, size_t(bytes));
      } else {
        if (k != row) std::memcpy(base + row * row_bytes, base + k * row_bytes, size_t(bytes));
        k--;
      }
    }
  });
}

}  // namespace prefkern
