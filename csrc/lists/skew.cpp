// CPU entry points of skew.h: pick the instruction set, share the rows out over torch's threads.
#include "lists/skew.h"

#include <algorithm>
#include <memory>

#include "core/isa.h"
#include "core/parallel.h"
#include "lists/skew_cpu.h"

namespace prefkern {

PK_ISA_TABLE(SkewCpu, skew_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// Rows of `size` elements, for which a task needs arrays of `length`.
template <class S, class Args>
void run(const Args& args, int64_t rows, int64_t size, int64_t length, void (*body)(const Args&, S*, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(kMostLanes, kElementsPerTask / std::max<int64_t>(1, size) / kMostLanes * kMostLanes);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<S[]> scratch(new S[kSkewArrays * kMostLanes * length]);
    body(args, scratch.get(), begin, end);
  });
}

}  // namespace

void cpu_skew(const SkewArgs<float>& a) {
  run(a, a.out.rows, 2 * a.width, a.width, skew_cpu().rows_f32);
  finish_rows(a.out);
}
void cpu_skew(const SkewArgs<double>& a) {
  run(a, a.out.rows, 2 * a.width, a.width, skew_cpu().rows_f64);
  finish_rows(a.out);
}
void cpu_skew_means(const SkewMeansArgs<float>& a) {
  run(a, a.lists, a.items * a.width, std::max(a.items, a.width), skew_cpu().means_f32);
}
void cpu_skew_means(const SkewMeansArgs<double>& a) {
  run(a, a.lists, a.items * a.width, std::max(a.items, a.width), skew_cpu().means_f64);
}

}  // namespace prefkern
